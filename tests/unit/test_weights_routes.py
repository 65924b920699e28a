"""The registry of routes, and what is derived from it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sglang_harness
from sglang_harness.errors import SpecError
from sglang_harness.runtime.attach import AttachedServer, Attachment
from sglang_harness.weights import routes
from sglang_harness.weights.routes import Job, Needs, Route, Sent, base
from sglang_harness.weights.routes.buckets import Bucket

PACKAGE = Path(sglang_harness.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "push-weights.md"


class Pigeon(Route):
    name = "pigeon"
    title = "carried by a pigeon"
    needs = Needs(gpu=True)

    def open(self, job: Job) -> None:
        pass

    def send(self, bucket: Bucket) -> Sent:
        raise NotImplementedError


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_routes", dict(base._routes))


def test_the_registry_is_complete_without_a_list_of_modules():
    assert routes.names() == [
        "cuda-ipc",
        "disk",
        "distributed",
        "shared-memory",
        "tensor",
        "tensor-bucket",
    ]
    assert routes.names(device="cpu") == [n for n in routes.names() if n != "cuda-ipc"]
    assert routes.names(device="gpu") == routes.names()


def test_one_line_registers_a_route(registry: None):
    assert routes.register(Pigeon) is Pigeon
    assert "pigeon" in routes.names()
    assert "pigeon" not in routes.names(device="cpu")
    assert isinstance(routes.make("pigeon"), Pigeon)
    assert "| `pigeon` | carried by a pigeon | a GPU | |" in routes.markdown()


def test_a_second_route_of_one_name_is_an_error(registry: None):
    class Other(Pigeon):
        name = "disk"

    with pytest.raises(ValueError, match="two routes are named 'disk': Disk and Other"):
        routes.register(Other)
    assert routes.kind("disk").__name__ == "Disk"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SpecError, match="Choose one of cuda-ipc, disk"):
        routes.kind("pigeon")


@pytest.mark.parametrize("name", routes.names())
def test_each_route_says_what_people_read(name: str):
    route = routes.kind(name)
    assert route.title
    assert not route.title.endswith(".")
    assert route.needs.posts
    assert route.__doc__


def target(**about: Any) -> Any:
    client = SimpleNamespace(
        has_route=lambda method, path: path == "/there", server_info=lambda: {"dp_size": 2}
    )
    running = AttachedServer(
        Attachment("http://127.0.0.1:1"), run_id="r", device="cpu", model_path="/m", model=None
    )
    return SimpleNamespace(client=client, running=running, device="cpu")


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(), None),
        (Needs(posts=("/there",)), None),
        (Needs(posts=("/there", "/not-there")), "no POST /not-there"),
        (Needs(gpu=True), "runs on a CPU"),
        (Needs(shared_folder=True), "--share"),
        (Needs(peer=True), "did not start the server"),
        (Needs(one_replica=True), "2 data-parallel replicas"),
    ],
)
def test_what_a_server_lacks_is_told(needs: Needs, reason: str | None):
    told = needs.lacking(target())
    assert told is None if reason is None else reason in str(told)


def test_the_documentation_has_the_table_of_the_registry():
    begin, end = "<!-- routes -->\n", "<!-- /routes -->"
    text = DOCS.read_text(encoding="utf-8")
    written = text.partition(begin)[2].partition(end)[0]
    assert written == routes.markdown(), (
        "print(sglang_harness.weights.routes.markdown()) has to stand between the marks"
    )


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(("package", "never"), [("weights", "server"), ("peer", "weights")])
def test_imports_go_down(package: str, never: str):
    """Also those for types alone."""
    for file in (PACKAGE / package).rglob("*.py"):
        up = {n for n in imports(file) if n.startswith(f"sglang_harness.{never}")}
        assert not up, file
