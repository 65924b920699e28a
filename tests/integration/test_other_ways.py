"""Servers that come to be, or to an end, in other ways than the usual one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import COMMAND_LIMIT, names_on_engine

from sglang_harness import ServerDied, ServerSpec, SGLangContainer, checkpoint
from sglang_harness._base import assets
from sglang_harness.runtime import images
from sglang_harness.server import Server
from sglang_harness.verdict import Verdict

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.engine


def test_a_container_of_ones_own_answers_and_its_death_is_told_with_the_reason() -> None:
    """The public class in anybody's test; then somebody kills it in the middle of an answer."""
    with SGLangContainer(model="tiny") as sglang:
        assert (
            sglang.client.generate("Hello", sampling={"max_new_tokens": 3}).completion_tokens == 3
        )
        assert sglang.report is not None
        long = {"max_new_tokens": 1500, "ignore_eos": True}
        events = sglang.client.stream("Once", sampling=long)
        next(events)
        sglang.get_wrapped_container().kill()
        with pytest.raises(ServerDied) as died:
            list(events)
        assert died.value.death.exit_code == 137
        assert died.value.death.noticed_after is not None
        with pytest.raises(ServerDied):
            sglang.client.generate("Hello")
        name = sglang._name
    assert name not in names_on_engine()


@pytest.mark.nightly
def test_a_dead_scheduler_takes_the_server_along_and_is_named() -> None:
    """SGLang ends a few seconds after its scheduler; what it says is an exit code of 137 or 0."""
    with SGLangContainer(model="tiny") as sglang:
        with pytest.raises(ServerDied) as died:
            sglang.client.generate([1, 2, 10_000_000], timeout=60)
        death = died.value.death
        assert not death.out_of_memory
        assert death.exception or death.cause, death


def test_models_and_weights_reach_the_server_through_a_volume() -> None:
    """As for an engine on another machine, where no folder of this one can be mounted."""
    server = Server.start(ServerSpec(model="tiny", model_mount="volume"))
    try:
        assert server.model is not None
        before = server.client.checksums()
        other = checkpoint.locate("tiny:5", print)
        assert other is not None
        inside = server.reach.share(other)
        assert server.client.update_weights_from_disk(str(inside)).success
        assert server.client.checksums().changed_since(before)
    finally:
        stopped = server.stop()
    assert stopped.left_behind == []
    assert stopped.exit_code == 0


@pytest.mark.nightly
def test_the_harness_works_from_inside_a_container_with_the_engines_socket(tmp_path: Path) -> None:
    """No path of that container exists for the engine, and loopback ports are out of reach."""
    image = images.build_cpu_image(None, print)
    inside = subprocess.run(
        ["docker", "run", "--rm", "--entrypoint", "python3", image, "--version"],
        capture_output=True, text=True, timeout=60,
    ).stdout.split()[-1]  # fmt: skip
    if inside.rsplit(".", 1)[0] != ".".join(map(str, sys.version_info[:2])):
        pytest.skip(f"the image has Python {inside}, this environment another: it cannot be lent")
    (site,) = [p for p in sys.path if p.endswith("site-packages")][:1]
    source = Path(assets.__file__).parents[2]
    out = tmp_path / "out"
    out.mkdir()
    model = checkpoint.locate("tiny", print)
    assert model is not None
    done = subprocess.run(
        [
            "docker", "run", "--rm", "--user", "0",
            "--volume", "/var/run/docker.sock:/var/run/docker.sock",
            "--volume", f"{source}:/source/harness:ro",
            "--volume", f"{assets.root()}/docker:/source/docker:ro",
            "--volume", f"{site}:/site:ro",
            "--volume", f"{model}:/model:ro",
            "--volume", f"{out}:/out",
            "--env", "PYTHONPATH=/source/harness:/site",
            "--env", "PYTHONDONTWRITEBYTECODE=1",
            "--entrypoint", "python3",
            image, "-c", "from sglang_harness.cli import main; main()",
            "qualify", "--image", image, "--model", "/model", "--out", "/out",
            "-k", "launch/", "-k", "weights/disk",
        ],
        capture_output=True, text=True, timeout=COMMAND_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    verdict = Verdict.read(out / "verdict.json")
    assert verdict.verdict == "pass"
    assert verdict.image is not None
    assert "/exchange/model" in verdict.image["command"]
    assert names_on_engine(verdict.run_id) == []


@pytest.mark.nightly
@pytest.mark.parametrize("version", ["0.5.20", "0.5.21", "0.5.22"])
def test_an_older_sglang_is_asked_what_it_can_do_and_not_guessed(
    tmp_path: Path, command: Run, version: str
) -> None:
    """0.5.20 has no weight-update session, and computes checksums only where CUDA is."""
    done = command("qualify", "--model", "tiny", "--sglang-version", version, "--strict-known")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert verdict.sglang_version == version
    reasons = {o.id: o.reason for o in verdict.outside_profile}
    if version == "0.5.20":
        assert "cannot compute checksums" in reasons["weights/disk"]
    assert {c.id for c in verdict.checks} >= {"weights/stale-prefix", "stop/abort-whole-id"}
