"""The command line: ``sglang-harness``. Thin: parses, calls, prints, and exits."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_harness import __version__, options, report, suite
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import HarnessError, Interrupted, SpecError
from sglang_harness.report import terminal
from sglang_harness.upkeep import kept_servers
from sglang_harness.verdict import Verdict

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Tests an SGLang server and returns a verdict with evidence.",
)
console = Console()
errors = Console(stderr=True)

#: A parameter's type for each kind of option.
_TYPES: dict[options.Kind, Any] = {
    "text": str | None,
    "path": Path | None,
    "number": int | None,
    "seconds": float | None,
    "list": list[str] | None,
    "flag": bool,
}

#: What to start, for commands that start one server and nothing else.
_WHAT = ("image", "version", "model", "device", "gpus", "pull", "port", "spec", "server-arg")


def _with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options ``names`` of the table, and their values by name as its first
    argument."""
    chosen = [option for option in options.at("command") if option.name in names]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            given = {o.name: values.pop(o.name.replace("-", "_")) for o in chosen}
            command(given, **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(
                option.name.replace("-", "_"),
                inspect.Parameter.KEYWORD_ONLY,
                default=False if option.kind == "flag" else None,
                annotation=Annotated[
                    _TYPES[option.kind], typer.Option(option.flag("command"), help=option.help)
                ],
            )
            for option in chosen
        ]
        parameters = [*added, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorated


@app.command()
@_with_options(*(option.name for option in options.at("command")))
def qualify(
    given: dict[str, Any],
    profile: Annotated[
        str,
        typer.Option(
            help="quick: checks that share one server. full: also checks that start their own."
        ),
    ] = "quick",
    select: Annotated[
        list[str] | None,
        typer.Option("-k", help="Run only the checks whose id contains this. Repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out"),
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="Write a second copy of junit.xml here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes prompts and perturbations repeatable.")] = 0,
    strict_known: Annotated[
        bool,
        typer.Option("--strict-known", help="Fail the run if a known defect no longer reproduces."),
    ] = False,
) -> None:
    """Start a server, run every check on it, and judge. Exit code 0 pass, 1 fail, 2 error."""
    from sglang_harness.run.qualification import LOG, Qualification, Request

    if profile not in ("quick", "full"):
        raise SpecError(f"--profile {profile!r} is neither 'quick' nor 'full'.")
    wanted = options.settle(given, "command")
    view = terminal.Terminal(console)
    request = Request(
        spec=wanted.spec,
        out=out,
        runtime=wanted.runtime,
        profile="full" if profile == "full" else "quick",
        patterns=select or [],
        seed=seed,
        keep_on_failure=given["keep-on-failure"],
        strict_known=strict_known,
    )
    run = Qualification(request, view)
    unwritten: SpecError | None = None
    try:
        verdict = run.run()
    except SpecError as error:
        if run.verdict is None:
            raise
        # The run is over and judged: it is shown although a file of it could not be written.
        unwritten, verdict = error, run.verdict
    finally:
        view.close()
        if junit_file is not None and run.verdict is not None:
            report.write("junit", run.verdict, junit_file)
    if run.no_server is not None:
        raise run.no_server
    terminal.show(verdict, console)
    console.print(
        f"Results in {escape(str(out))}: {', '.join((*report.FILES, LOG))}", highlight=False
    )
    if run.kept is not None:
        _show_held(run.kept)
    if unwritten is not None:
        raise unwritten
    raise typer.Exit(verdict.exit_code)


@app.command()
@_with_options(*_WHAT, "start-timeout")
def up(given: dict[str, Any]) -> None:
    """Start a server and keep it running for you."""
    from sglang_harness.server import Server

    wanted = options.settle(given, "command")
    view = terminal.Terminal(console)
    try:
        with interruptions():
            server = Server.start(wanted.spec, say=view.say, held=True)
            try:
                kept = kept_servers.hold(server)
            except BaseException:
                server.stop(at_once=True)
                raise
    finally:
        view.close()
    _show_held(kept)


@app.command()
@_with_options("version")
def warm(
    given: dict[str, Any],
    runtime: Annotated[str, typer.Option("--runtime", help="auto, docker or process.")] = "auto",
    python: Annotated[
        Path | None, typer.Option(help="Runtime process: a Python that has SGLang.")
    ] = None,
) -> None:
    """Keep a parent process that has imported SGLang: servers forked from it answer in seconds.

    'pytest', and what 'qualify' starts after its first server, find it by themselves. It ends
    after an hour without use, or by 'down'.
    """
    from sglang_harness.runtime.warm.keep import keep_warm

    view = terminal.Terminal(console)
    wanted = options.settle(given, "command")
    try:
        with interruptions():
            kept, seconds = keep_warm(wanted.spec, runtime, python, view.say)
    finally:
        view.close()
    how = "is running already" if seconds is None else f"is ready after {seconds:.1f} s"
    console.print(
        f"A parent of SGLang {kept.version} {how}: [bold]{kept.name}[/bold] ({kept.runtime})\n"
        f"  stop: {_own_command()} down {kept.name}  (it ends by itself after an hour without use)",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Which one (default: all of yours).")] = None,
) -> None:
    """Stop servers kept by 'up' or --keep-on-failure, and parents kept by 'warm'."""
    from sglang_harness.runtime.warm import kept_parents

    servers = [s for s in kept_servers.held_servers() if name is None or s.name == name]
    parents = [p for p in kept_parents.on_record() if name is None or p.name == name]
    if name is not None and not servers and not parents:
        raise SpecError(
            f"No kept server or parent is named {name}.", advice="'docker ps' shows what runs."
        )
    failed: list[str] = []
    releases = [(each.name, partial(kept_servers.release, each)) for each in servers]
    for stopped, release in [*releases, *((p.name, partial(kept_parents.end, p)) for p in parents)]:
        try:
            left = release()
        except HarnessError as error:
            left = [f"{stopped}: {error}"]
        failed += left
        if not left:
            console.print(f"stopped {stopped}", highlight=False)
    if failed:
        raise HarnessError("Not everything could be stopped: " + "; ".join(failed))
    if not servers and not parents:
        console.print("nothing is kept")


@app.command()
def sweep(
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Also remove kept servers and resources of other running sessions."
        ),
    ] = False,
) -> None:
    """Remove what dead runs left on the Docker engine and on disk."""
    from sglang_harness.upkeep.sweep import sweep as sweep_now

    swept = sweep_now(everything=everything)
    for what, lines in (("removed", swept.removed), ("left", swept.left)):
        for line in lines:
            console.print(f"{what} {line}", highlight=False, markup=False, soft_wrap=True)
    if swept.left:
        console.print("  remove these by hand, or with --all, once nothing uses them")
    if not swept.removed and not swept.left and not swept.failed:
        console.print("nothing was left behind")
    if swept.failed:
        raise HarnessError("Not everything could be removed: " + "; ".join(swept.failed))


@app.command()
def doctor() -> None:
    """Check the prerequisites: engine, GPU, driver, images, disk, ports, versions."""
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


@app.command("gpu-check")
@_with_options("server-arg")
def gpu_check(
    given: dict[str, Any],
    device: Annotated[
        str, typer.Option(help="gpu, or cpu for a rehearsal in which no GPU is seen.")
    ] = "gpu",
    kit: Annotated[Path | None, typer.Option(help="Folder of an unpacked kit.")] = None,
    python: Annotated[
        Path | None, typer.Option(help="Runtime process: a Python that has SGLang.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="process or docker.")] = "process",
    image: Annotated[str | None, typer.Option(help="Runtime docker: the image.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 3600.0,
    slow: Annotated[float, typer.Option(help="Factor of every time limit.")] = 1.0,
    part: Annotated[list[str] | None, typer.Option(help="Only this part. Repeatable.")] = None,
    release: Annotated[
        list[str] | None, typer.Option(help="Only this version of SGLang. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results: new, or empty.")] = None,
    list_parts: Annotated[
        bool, typer.Option("--list", help="List the parts with their time limits; run nothing.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="The list as the table of docs/gpu-check.md.")
    ] = False,
) -> None:
    """Find out what only a GPU can show. Exit code 0 all held, 1 one failed, 3 not all was run."""
    from sglang_harness.gpu_check import part as parts_of_it
    from sglang_harness.gpu_check import request, run_parts, summary
    from sglang_harness.gpu_check.machine import NotRun

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            # Whoever read this has gone; the results are in files, and minutes of a GPU are dear.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.close(nothing)

    if as_markdown:
        say(parts_of_it.as_markdown(run_parts.table()))
        return
    if list_parts:
        for each in run_parts.table():
            say(f"{each.name:18} {each.seconds:5.0f} s  {each.asks}")
        return
    try:
        asked = request.from_words(
            device=device,
            kit=kit,
            python=python,
            runtime=runtime,
            image=image,
            budget=budget,
            slow=slow,
            parts=part or [],
            releases=release or [],
            server_args=given["server-arg"],
            out=out,
        )
        results, folder = request.run(asked, say)
    except NotRun as why:
        say(f"not run: {why}")
        raise typer.Exit(3) from None
    for line in summary.findings(results):
        say(line)
    say(f"Results in {folder}: summary.txt, results.json, results.tar.gz")
    raise typer.Exit(results.exit_code)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of docs/checks.md.")
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
    """Make a model that needs no hub, unless it is there, and print its folder."""
    from sglang_harness import checkpoint

    folder = checkpoint.locate(name, lambda message: errors.print(message, highlight=False))
    if folder is None:
        raise SpecError(f"{name} is a name on the hub; the server downloads it itself.")
    print(folder)


kit_app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    help="Build an archive for a GPU host without network and Docker: SGLang, the harness, and "
    "what they miss there. On that host ./gpu-check in it is the one command.",
)
app.add_typer(kit_app, name="kit")


@kit_app.callback()
def kit(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Option(
            help="A file that 'kit describe' wrote on the host, or a shipped target "
            "(default: an H100 with Python 3.12, torch 2.11 and CUDA 13)."
        ),
    ] = None,
    python_version: Annotated[
        str | None, typer.Option(help="A host without a file: its Python, such as 3.12.")
    ] = None,
    torch: Annotated[str | None, typer.Option(help="And its torch, such as 2.11.0.")] = None,
    cuda: Annotated[str | None, typer.Option(help="And torch's CUDA (default 13).")] = None,
    installed: Annotated[
        Path | None,
        typer.Option(help="And what is there: a file with a name or name==version on each line."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU generation, such as sm90 or 9.0, in place of the target's own. "
            "'none': without kernels, for a rehearsal on a CPU."
        ),
    ] = None,
    sglang_version: Annotated[
        list[str] | None,
        typer.Option(help="SGLang to put in (default: the newest for that torch). Repeatable."),
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(help="What to put in, from a kit built before: nothing is resolved."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The archive (default: by its name, in this folder).")
    ] = None,
    largest: Annotated[float, typer.Option(help="MiB that the archive may have.")] = 58.0,
) -> None:
    if context.invoked_subcommand is not None:
        return
    from sglang_harness.kit.build import build
    from sglang_harness.kit.request import Host, request

    wanted = request(
        target=target,
        host=Host(python_version, torch, cuda, installed),
        gpu=gpu,
        versions=sglang_version or [],
        lock=lock,
        out=out,
        largest=largest,
    )
    view = terminal.Terminal(console)
    try:
        with interruptions():
            built = build(wanted, view.say)
    finally:
        view.close()
    for line in built.summary():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@kit_app.command("describe")
def kit_describe(
    python: Annotated[
        Path | None, typer.Option(help="The Python that has torch (default: the harness's own).")
    ] = None,
    script: Annotated[
        bool,
        typer.Option(
            "--script", help="Print the program that describes, to be carried to the host."
        ),
    ] = False,
) -> None:
    """Describe this host and a Python on it as JSON, for --target."""
    from sglang_harness.kit import request

    print(request.script() if script else request.described(python), end="" if script else "\n")


@app.command()
def version() -> None:
    """Print the version of the harness."""
    print(__version__)


def _show_held(server: kept_servers.Held) -> None:
    console.print(
        f"The server keeps running: [bold]{escape(server.address)}[/bold]", highlight=False
    )
    console.print(
        f"  key:  export SGLANG_API_KEY=$({_own_command()} key {server.name})\n"
        f"  log:  docker logs -f {server.name}\n"
        f"  stop: {_own_command()} down {server.name}",
        highlight=False,
        soft_wrap=True,
    )


def _own_command() -> str:
    """How this command is called here: by its name, where the search path finds it."""
    called = Path(sys.argv[0])
    named = shutil.which("sglang-harness")
    if called.name != "sglang-harness" or (named and Path(named).samefile(called)):
        return "sglang-harness"
    return str(called)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Name of a kept server.")]) -> None:
    """Print the API key of a kept server, for a variable of your shell."""
    for server in kept_servers.held_servers():
        if server.name == name:
            print(server.api_key)
            return
    raise SpecError(f"No kept server is named {name}.")


def main() -> None:
    """Entry point. Every mistake in its use ends in one line and exit code 2."""
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
            if message := error.format_message():  # empty where the help was printed already
                line = f"[bold red]sglang-harness:[/bold red] {escape(message)}"
                errors.print(line, highlight=False, soft_wrap=True)
            sys.exit(2)
        # Python's own exit code for it, 1, would say that the server has failed.
        traceback.print_exc()
        sys.exit(2)
