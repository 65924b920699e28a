"""The docs name what there is: packages, commands, options, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import sglang_harness
from sglang_harness._base import assets
from sglang_harness.cli import app
from sglang_harness.gpu_check import run_parts
from sglang_harness.gpu_check.part import as_markdown

SOURCE = Path(sglang_harness.__file__).parent
ROOT = assets.root()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
READ = {page: page.read_text(encoding="utf-8") for page in PAGES}


def packages() -> list[Path]:
    return [
        p
        for p in sorted(SOURCE.iterdir())
        if (p.suffix == ".py" and p.name != "__init__.py") or (p / "__init__.py").is_file()
    ]


@pytest.mark.parametrize("package", packages(), ids=lambda p: p.name)
def test_every_package_at_the_top_has_a_line_in_how_it_works(package: Path):
    tree = READ[ROOT / "docs" / "how-it-works.md"].partition("## The package")[2]
    name = f"{package.name}/" if package.is_dir() else package.name
    assert re.search(rf"^ {{6}}{re.escape(name)} +\S", tree, re.MULTILINE)


def test_how_it_works_names_no_package_that_is_gone():
    tree = READ[ROOT / "docs" / "how-it-works.md"].partition("## The package")[2].partition("##")[0]
    folder = SOURCE
    for line in tree.splitlines():
        if found := re.match(r"^( {6}| {8})(\S+\.py|\S+/) ", line):
            place = SOURCE if len(found[1]) == 6 else folder
            assert (place / found[2]).exists(), line
            if len(found[1]) == 6:
                folder = SOURCE / found[2]


def commands() -> dict[str, set[str]]:
    """Every sub-command with its options; 'kit describe' is one as 'kit' is."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    every = dict(group.commands)
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            every |= {f"{name} {inner}": made for inner, made in command.commands.items()}
    return {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for name, command in every.items()
    }


def shown(text: str) -> list[tuple[str, list[str]]]:
    """Sub-commands in ``text`` as they would be typed, each with its options."""
    joined = text.replace("\\\n", " ")
    found = re.findall(
        r"(?:^ +|`)(?:\$ )?sglang-harness +([a-z][a-z-]*)([^`\n#|]*)", joined, re.MULTILINE
    )
    known, typed = commands(), []
    for name, rest in found:
        words = rest.split()
        if words and f"{name} {words[0]}" in known:
            name = f"{name} {words[0]}"
        typed.append((name, re.findall(r"(?:^|\s)(--?[a-z][a-z-]*)", rest)))
    return typed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_that_is_shown_exists_with_its_options(page: Path):
    known = commands()
    for name, options in shown(READ[page]):
        assert name in known, f"sglang-harness {name}"
        assert set(options) - {"--help"} <= known[name], f"sglang-harness {name} {options}"


def test_commands_are_found_in_the_docs_at_all():
    assert {name for page in PAGES for name, _ in shown(READ[page])} >= {"qualify", "judge", "warm"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_make_target_that_is_shown_exists(page: Path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ +|`)make ([a-z-]+)", READ[page], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_between_the_docs_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", READ[page]):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", READ[ROOT / "README.md"]))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == linked


def test_the_parts_of_gpu_check_in_its_page_are_those_that_there_are():
    page = READ[ROOT / "docs" / "gpu-check.md"]
    between = re.search(r"<!-- gpu-check parts -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert between, "'sglang-harness gpu-check --markdown' prints what belongs there"
    assert between[1] == as_markdown(run_parts.table())
