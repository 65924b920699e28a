"""The command line: ``sglang-harness``. Thin: parses, calls, shows, and exits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_harness import __version__, report, suite
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import HarnessError, Interrupted, SpecError
from sglang_harness.report import terminal
from sglang_harness.spec import from_options
from sglang_harness.upkeep import kept_servers
from sglang_harness.verdict import Verdict

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Tells, with evidence, whether an SGLang server can be trusted.",
)
console = Console()
errors = Console(stderr=True)

Image = Annotated[
    str | None, typer.Option(help="Image to run; without it the pinned one for the device.")
]
SglangVersion = Annotated[
    str | None,
    typer.Option("--sglang-version", help="Version to build for the CPU, or of the GPU image."),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A folder, a hub name, 'smollm2' (the default), 'tiny[:SEED]', or a tiny one of "
        "another architecture: tiny-qwen2, tiny-qwen3, tiny-qwen3-moe, tiny-mixtral."
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or gpu.")]
Gpus = Annotated[str | None, typer.Option(help="all, or indices or UUIDs joined by commas.")]
RuntimeName = Annotated[
    str, typer.Option("--runtime", help="auto, docker, compose, or process (no container).")
]
Python = Annotated[Path | None, typer.Option(help="Runtime process: a Python that has SGLang.")]
ComposeFile = Annotated[Path | None, typer.Option(help="Runtime compose: a compose file of yours.")]
ComposeService = Annotated[
    str | None, typer.Option(help="Runtime compose: which service of your file.")
]
Url = Annotated[
    str | None,
    typer.Option(help="Look at a server that runs already; its key comes from SGLANG_API_KEY."),
]
AllowChanges = Annotated[
    bool,
    typer.Option("--allow-changes", help="With --url: also what changes it and is put back."),
]
Share = Annotated[
    str | None,
    typer.Option(help="With --url: LOCAL:INSIDE, a folder that the server sees too."),
]
Pull = Annotated[str | None, typer.Option(help="missing, always or never.")]
Port = Annotated[int | None, typer.Option(help="Port on the host; without it a free one.")]
SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="YAML file with the fields of a server spec.")
]
ServerArg = Annotated[
    list[str] | None,
    typer.Option(
        "--server-arg",
        help="A flag of SGLang's: name=value, or name. Repeat it for more flags, or more values.",
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        help="auto, cold (each server as its image starts it) or warm (forked from a parent that "
        "has imported SGLang)."
    ),
]
StartLimit = Annotated[
    float | None, typer.Option("--start-timeout", help="Seconds until the first generation.")
]
CheckLimit = Annotated[float | None, typer.Option("--check-timeout", help="Seconds a check.")]
RunLimit = Annotated[float | None, typer.Option("--run-timeout", help="Seconds for all of it.")]


@app.command()
def qualify(
    image: Image = None,
    sglang_version: SglangVersion = None,
    model: Model = None,
    device: Device = None,
    gpus: Gpus = None,
    pull: Pull = None,
    port: Port = None,
    spec: SpecFile = None,
    server_arg: ServerArg = None,
    runtime: RuntimeName = "auto",
    python: Python = None,
    compose_file: ComposeFile = None,
    compose_service: ComposeService = None,
    url: Url = None,
    allow_changes: AllowChanges = False,
    share: Share = None,
    profile: Annotated[str, typer.Option(help="quick: one server. full: more.")] = "quick",
    select: Annotated[
        list[str] | None, typer.Option("-k", help="Only checks whose id holds this. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out"),
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="A second copy of junit.xml.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes prompts and perturbations repeatable.")] = 0,
    keep_on_failure: Annotated[
        bool, typer.Option("--keep-on-failure", help="Leave the server running if it is no pass.")
    ] = False,
    strict_known: Annotated[
        bool, typer.Option("--strict-known", help="A listed defect that does not show is red.")
    ] = False,
    start: Start = None,
    start_timeout: StartLimit = None,
    check_timeout: CheckLimit = None,
    run_timeout: RunLimit = None,
) -> None:
    """Start a server, ask it every question, and judge. Exit code 0 pass, 1 fail, 2 error."""
    from sglang_harness.run.qualification import Qualification, Request
    from sglang_harness.runtime.registry import choose

    if profile not in ("quick", "full"):
        raise SpecError(f"--profile {profile!r} is neither 'quick' nor 'full'.")
    wanted = from_options(
        spec,
        {"start": start_timeout, "check": check_timeout, "run": run_timeout},
        server_arg,
        image=image,
        sglang_version=sglang_version,
        model=model,
        device=device,
        gpus=gpus,
        pull=pull,
        port=port,
        start=start,
    )
    attachment = kept_servers.attachment(
        url,
        allow_changes=allow_changes,
        share=share,
        contradicting={
            "--image": image, "--sglang-version": sglang_version, "--device": device,
            "--gpus": gpus, "--pull": pull, "--port": port, "--server-arg": server_arg or None,
            "--spec": spec, "--python": python, "--start": start,
            "--compose-file": compose_file,
            "--compose-service": compose_service,
            "--keep-on-failure": keep_on_failure or None,
            "--runtime": None if runtime in ("auto", "attach" if url else "") else runtime,
        },
    )  # fmt: skip
    view = terminal.Terminal(console)
    request = Request(
        spec=wanted,
        out=out,
        runtime=attachment
        or choose(
            runtime,
            {
                "python": python,
                "compose-file": compose_file,
                "compose-service": compose_service,
            },
        ),
        profile="full" if profile == "full" else "quick",
        patterns=select or [],
        seed=seed,
        keep_on_failure=keep_on_failure,
        strict_known=strict_known,
    )
    run = Qualification(request, view)
    try:
        verdict = run.run()
    finally:
        view.close()
    terminal.show(verdict, console)
    console.print(
        f"Results: {escape(str(out))}/verdict.json, junit.xml, server.log", highlight=False
    )
    if junit_file is not None:
        report.write("junit", verdict, junit_file)
    if run.kept is not None:
        _show_held(run.kept)
    raise typer.Exit(verdict.exit_code)


@app.command()
def up(
    image: Image = None,
    sglang_version: SglangVersion = None,
    model: Model = None,
    device: Device = None,
    gpus: Gpus = None,
    pull: Pull = None,
    port: Port = None,
    spec: SpecFile = None,
    server_arg: ServerArg = None,
    start_timeout: StartLimit = None,
) -> None:
    """Start a server and leave it running for you."""
    from sglang_harness.server import Server

    wanted = from_options(
        spec,
        {"start": start_timeout},
        server_arg,
        image=image,
        sglang_version=sglang_version,
        model=model,
        device=device,
        gpus=gpus,
        pull=pull,
        port=port,
    )
    view = terminal.Terminal(console)
    try:
        with interruptions():
            server = Server.start(wanted, say=view.say, held=True)
            kept = kept_servers.hold(server)
    finally:
        view.close()
    _show_held(kept)


@app.command()
def warm(
    sglang_version: SglangVersion = None,
    runtime: Annotated[str, typer.Option("--runtime", help="auto, docker or process.")] = "auto",
    python: Python = None,
) -> None:
    """Keep a parent that has imported SGLang: servers forked from it answer in seconds.

    'pytest', and what 'qualify' starts after its first server, find it by themselves. It ends by
    itself after an hour without use, or by 'down'.
    """
    from sglang_harness.runtime.warm.keep import keep_warm

    view = terminal.Terminal(console)
    wanted = from_options(None, {}, None, sglang_version=sglang_version)
    try:
        with interruptions():
            kept, seconds = keep_warm(wanted, runtime, python, view.say)
    finally:
        view.close()
    how = "is there already" if seconds is None else f"is ready after {seconds:.1f} s"
    console.print(
        f"A parent of SGLang {kept.version} {how}: [bold]{kept.name}[/bold] ({kept.runtime})\n"
        f"  stop: {_own_command()} down {kept.name}  (it ends by itself after an hour without use)",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Which one; without it all of yours.")] = None,
) -> None:
    """Stop servers that 'up' or --keep-on-failure left running, and parents kept by 'warm'."""
    from sglang_harness.runtime.warm import kept_parents

    servers = [s for s in kept_servers.held_servers() if name is None or s.name == name]
    parents = [p for p in kept_parents.on_record() if name is None or p.name == name]
    if name is not None and not servers and not parents:
        raise SpecError(
            f"Nothing that is held is named {name}.", advice="'docker ps' shows what runs."
        )
    for server in servers:
        if failed := kept_servers.release(server):
            raise HarnessError("; ".join(failed))
        console.print(f"stopped {server.name}", highlight=False)
    for parent in parents:
        if failed := kept_parents.end(parent):
            raise HarnessError("; ".join(failed))
        console.print(f"stopped {parent.name}", highlight=False)
    if not servers and not parents:
        console.print("nothing is held")


@app.command()
def sweep(
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is held, and other live runs' things.")
    ] = False,
) -> None:
    """Remove what dead runs left on the Docker engine and on disk."""
    from sglang_harness.upkeep.sweep import sweep as sweep_now

    removed, failed = sweep_now(everything=everything)
    for line in removed:
        console.print(f"removed {line}", highlight=False)
    if not removed and not failed:
        console.print("nothing of ours was left behind")
    if failed:
        raise HarnessError("Not everything could be removed: " + "; ".join(failed))


@app.command()
def doctor() -> None:
    """Look at what is needed: engine, GPU, driver, images, disk, ports, versions."""
    from sglang_harness.upkeep.doctor import examine

    findings = examine()
    marks = {"ok": "[green]✓[/green]", "note": "[yellow]≈[/yellow]", "bad": "[red]✗[/red]"}
    for finding in findings:
        subject = f"[bold]{escape(finding.subject)}[/bold]"
        line = f"{marks[finding.state]} {subject}: {escape(finding.found)}"
        wide = not console.is_terminal
        console.print(line, highlight=False, soft_wrap=wide)
        if finding.advice:
            console.print(f"    {escape(finding.advice)}", highlight=False, soft_wrap=wide)
    raise typer.Exit(2 if any(f.state == "bad" for f in findings) else 0)


@app.command()
def judge(
    out: Annotated[Path, typer.Argument(help="Folder of a saved run, or its verdict.json.")],
    strict_known: Annotated[
        bool,
        typer.Option(
            "--strict-known",
            help="Fail if a known defect no longer reproduces; implied if the run was strict.",
        ),
    ] = False,
) -> None:
    """Judge a saved run again, without server, model or torch. Writes nothing."""
    saved = Verdict.read(out / "verdict.json" if out.is_dir() else out)
    from sglang_harness.run.rejudge import judge_saved

    again, changed = judge_saved(saved, strict_known=strict_known)
    for before, after in changed:
        console.print(
            f"{escape(after.id)}: was {before.outcome.value}, is now {after.outcome.value}"
            + (f": {escape(after.message)}" if after.message else ""),
            highlight=False,
        )
    terminal.show(again, console)
    raise typer.Exit(again.exit_code)


@app.command()
def checks(
    as_json: Annotated[bool, typer.Option("--json", help="As data.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="As the tables of docs/checks.md.")
    ] = False,
) -> None:
    """List every check: id, sentence, needs, profile."""
    from sglang_harness.suite import installed

    installed.load()
    rows = [
        {
            "id": c.id,
            "sentence": c.sentence,
            "needs": [n.name for n in c.needs],
            "profile": c.profile,
        }
        for c in suite.registered().values()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if as_markdown:
        print(suite.as_markdown())
        return
    table = Table(header_style="bold")
    for name in ("id", "what must hold", "needs", "profile"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            str(row["id"]), str(row["sentence"]), ", ".join(row["needs"]), str(row["profile"])
        )
    console.print(table)


@app.command()
def known(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="As the table of docs/track-record.md.")
    ] = False,
) -> None:
    """List the known defects of SGLang, each with the command that shows it again."""
    from sglang_harness.suite import known_defects

    defects = known_defects.load(set(suite.registered()))
    if as_markdown:
        print(known_defects.as_markdown(defects))
        return
    for defect in defects:
        console.print(
            f"[bold]{escape(defect.id)}[/bold] (SGLang {', '.join(defect.versions)}): "
            f"{escape(defect.notice)}\n  {escape(defect.issue)}\n  {escape(defect.command)}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def model(
    name: Annotated[
        str, typer.Argument(help="'smollm2', or 'tiny[-ARCHITECTURE][:SEED]'.")
    ] = "smollm2",
) -> None:
    """Make a model that needs no hub, where it is missing, and print its folder."""
    from sglang_harness import checkpoint

    folder = checkpoint.locate(name, lambda message: errors.print(message, highlight=False))
    if folder is None:
        raise SpecError(f"{name} is a name on the hub, which the server fetches itself.")
    print(folder)


@app.command()
def version() -> None:
    """Print the version of the harness."""
    print(__version__)


def _show_held(server: kept_servers.Held) -> None:
    console.print(
        f"The server is left running: [bold]{escape(server.address)}[/bold]", highlight=False
    )
    console.print(
        f"  key:  export SGLANG_API_KEY=$({_own_command()} key {server.name})\n"
        f"  log:  docker logs -f {server.name}\n"
        f"  stop: {_own_command()} down {server.name}",
        highlight=False,
        soft_wrap=True,
    )


def _own_command() -> str:
    """How this command is called here: by its name where that finds it."""
    called = Path(sys.argv[0])
    named = shutil.which("sglang-harness")
    if called.name != "sglang-harness" or (named and Path(named).samefile(called)):
        return "sglang-harness"
    return str(called)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Name of a held server.")]) -> None:
    """Print the API key of a held server, for a variable of your shell."""
    for server in kept_servers.held_servers():
        if server.name == name:
            print(server.api_key)
            return
    raise SpecError(f"No held server is named {name}.")


def main() -> None:
    """Entry point. Every mistake of a person ends in one line and exit code 2."""
    try:
        # Without its standalone mode typer hands the exit code back.
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except Interrupted as error:
        errors.print(f"[bold]sglang-harness:[/bold] {escape(str(error))}", highlight=False)
        sys.exit(128 + error.signal_number)
    except KeyboardInterrupt:
        sys.exit(130)
    except HarnessError as error:
        errors.print(
            f"[bold red]sglang-harness:[/bold red] {escape(str(error))}",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            if words := error.format_message():  # empty where the help was printed already
                line = f"[bold red]sglang-harness:[/bold red] {escape(words)}"
                errors.print(line, highlight=False, soft_wrap=True)
            sys.exit(2)
        raise
