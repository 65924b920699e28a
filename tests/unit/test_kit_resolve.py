"""What goes into a kit: resolved by uv for the target, from an index of small wheels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import wheel_index
from wheel_index import make_wheel

from sglang_harness.errors import KitError, MissingExtra
from sglang_harness.kit import resolve as resolving
from sglang_harness.kit.harness_files import own_requirements
from sglang_harness.kit.lock import Lock
from sglang_harness.kit.releases import catalogue
from sglang_harness.kit.requirements import parsed
from sglang_harness.kit.resolve import resolve
from sglang_harness.kit.target import Target

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("uv") is None,
    reason="uv, of the extra [kit], is not installed here",
)

OWN = [r.name.lower() for r in parsed(own_requirements())]


def target(**packages: str | None) -> Target:
    return Target.model_validate(
        {
            "schema": 1,
            "python": "3.12.3",
            "torch": "2.11.0+cu130",
            "cuda": "13.0",
            "gpus": [{"capability": "9.0"}],
            "packages": {**dict.fromkeys(OWN), "torch": "2.11.0+cu130", "dill": None, **packages},
        }
    )


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    wheel_index.use(monkeypatch, folder, tmp_path / "cache")
    make_wheel(folder, "torch", "2.11.0", requires=["triton"])
    make_wheel(folder, "triton", "3.0")
    sglang(folder, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4")
    sglang(folder, "0.5.23", "torch==2.14.1", "sglang-kernel==0.4.10")
    make_wheel(folder, "sglang-kernel", "0.4.4", requires=["torch==2.11.0"])
    return folder


def sglang(folder: Path, version: str, *requires: str) -> None:
    make_wheel(folder, "sglang", version, requires=requires)


def locked(where: Target, *versions: str) -> Lock:
    releases = catalogue().choose("2.11.0", list(versions))
    return resolve(where, releases, catalogue(), True, lambda _: None)


def placed(lock: Lock) -> dict[tuple[str, str], str]:
    """The site of each package by name and version."""
    return {(p.name, p.version): p.site for p in lock.packages}


def test_what_is_missing_is_added_with_what_it_requires(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha>=1", "numpy")
    make_wheel(links, "alpha", "1.0", requires=["beta"])
    make_wheel(links, "beta", "7")
    lock = locked(target(), "0.5.15")
    assert placed(lock) == {
        ("sglang", "0.5.15"): "site",
        ("sglang-kernel", "0.4.4"): "site",
        ("alpha", "1.0"): "site",
        ("beta", "7"): "site",
    }
    assert lock.releases == ("0.5.15",)


def test_what_the_target_has_is_kept_where_it_satisfies(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha", "beta", "gamma==2")
    for version in ("1.0", "2.0"):
        for name in ("alpha", "beta", "gamma"):
            make_wheel(links, name, version)
    lock = locked(target(alpha="1.0", beta=None, gamma="1.0"), "0.5.15")
    # alpha is there in a version that will do although a newer one exists, beta in some version,
    # and gamma in one that will not do.
    assert set(placed(lock)) == {
        ("sglang", "0.5.15"),
        ("sglang-kernel", "0.4.4"),
        ("gamma", "2.0"),
    }


def test_an_unknown_version_does_not_do_where_sglang_states_one(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha==1.0", "beta>=1")
    make_wheel(links, "alpha", "1.0")
    lock = locked(target(alpha=None, beta=None), "0.5.15")
    assert ("alpha", "1.0") in placed(lock)
    assert "beta" not in {p.name for p in lock.packages}


def test_a_version_that_an_extra_states_is_not_asked_for(links: Path):
    sglang(
        links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha",
        "alpha==1.0; extra == 'pictures'",
    )  # fmt: skip
    assert "alpha" not in {p.name for p in locked(target(alpha=None), "0.5.15").packages}


def test_what_is_left_out_or_stood_in_is_not_looked_for(links: Path):
    sglang(
        links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4",
        "flashinfer_python[cu13]==0.6.12", "IPython", "scipy", "sgl-deep-gemm==0.1.4",
    )  # fmt: skip
    assert len(locked(target(), "0.5.15").packages) == 2


def test_releases_share_what_they_can_and_have_the_rest_for_themselves(links: Path):
    native = ("torch==2.11.0", "sglang-kernel==0.4.4")
    sglang(links, "0.5.15", *native, "alpha==1.0", "beta", "gamma")
    sglang(links, "0.5.23", "torch==2.14.1", "sglang-kernel==0.4.10", "alpha==2.0", "beta<2", "new")
    for name, versions in {"alpha": "12", "beta": "12", "gamma": "1", "new": "1"}.items():
        for version in versions:
            make_wheel(links, name, f"{version}.0")
    lock = locked(target())
    assert lock.releases == ("0.5.15", "0.5.23")
    # beta: the second release cannot take the newest one, so the first takes the same.
    assert placed(lock) == {
        ("sglang-kernel", "0.4.4"): "site",
        ("beta", "1.0"): "site",
        ("alpha", "1.0"): "site-0.5.15",
        ("gamma", "1.0"): "site-0.5.15",
        ("sglang", "0.5.15"): "site-0.5.15",
        ("alpha", "2.0"): "site-0.5.23",
        ("new", "1.0"): "site-0.5.23",
        ("sglang", "0.5.23"): "site-0.5.23",
    }


def test_what_only_the_targets_own_packages_require_is_not_added(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha")
    make_wheel(links, "alpha", "1.0", requires=["left-out-on-purpose"])
    make_wheel(links, "left-out-on-purpose", "1.0")
    lock = locked(target(alpha="1.0"), "0.5.15")
    assert "left-out-on-purpose" not in {p.name for p in lock.packages}


def test_where_only_torch_is_known_what_came_with_it_is_there(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha")
    make_wheel(links, "alpha", "1.0", requires=["triton", "torch>=2", "jinja"])
    # The index has a torch for CPUs first, which requires no triton.
    make_wheel(links, "torch", "2.11.0", requires=["jinja"])
    make_wheel(links, "jinja", "1.0")
    for name in {*OWN, "dill"} - {"torch"}:
        make_wheel(links, name, "99.0")
    where = Target.from_options(
        python="3.12", torch="2.11.0", cuda="13", gpu="sm90", installed=None
    )
    lock = locked(where, "0.5.15")
    assert lock.with_torch == ("jinja", "triton")
    assert not {"torch", "triton", "jinja"} & {p.name for p in lock.packages}
    assert ("psutil", "99.0") in placed(lock)


def test_what_depends_on_torch_is_taken_in_the_version_for_the_targets_torch(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "vision")
    sglang(links, "0.5.23", "torch==2.14.1", "sglang-kernel==0.4.10", "vision")
    make_wheel(links, "vision", "1.0", requires=["torch==2.11.0"])
    make_wheel(links, "vision", "2.0", requires=["torch>=2.14"])
    assert placed(locked(target()))["vision", "1.0"] == "site"


def test_torchs_companions_are_not_looked_for_where_they_are_there(links: Path):
    make_wheel(links, "torch", "2.11.0", requires=["triton==3.6.0", "nvidia-nccl-cu13==2.28"])
    lock = locked(target(triton="3.6.0", **{"nvidia-nccl-cu13": "2.28"}), "0.5.15")
    assert len(lock.packages) == 2


def test_no_solution_is_said_in_one_line_with_what_is_in_the_way(links: Path):
    sglang(links, "0.5.15", "torch==2.11.0", "sglang-kernel==0.4.4", "alpha", "beta>=3")
    make_wheel(links, "alpha", "1.0", requires=["beta<3"])
    make_wheel(links, "beta", "2.0")
    with pytest.raises(KitError, match=r"no set of packages for Python 3\.12 .*beta>=3") as raised:
        locked(target(), "0.5.15")
    assert "\n" not in str(raised.value)


def test_no_wheel_for_the_targets_python_is_said(links: Path):
    (links / "sglang_kernel-0.4.4-py3-none-any.whl").unlink()
    make_wheel(links, "sglang-kernel", "0.4.4", tag="cp311-cp311-manylinux_2_17_x86_64")
    with pytest.raises(KitError, match=r"no wheel of sglang-kernel==0\.4\.4 for Python 3\.12"):
        locked(target(), "0.5.15")


def test_without_uv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, links: Path):
    def refuse() -> str:
        raise MissingExtra("A kit without a lock", "kit")

    monkeypatch.setattr(resolving, "_program", refuse)
    with pytest.raises(MissingExtra, match=r"pip install 'sglang-harness\[kit\]'"):
        locked(target(), "0.5.15")
