"""The wheels of a kit: the one for the target, with the one hash, from pip's index or the cache."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import wheel_index
from wheel_index import digest, make_wheel

from sglang_harness.errors import KitError
from sglang_harness.kit import index, wheels
from sglang_harness.kit.lock import Lock, Locked
from sglang_harness.kit.releases import catalogue
from sglang_harness.kit.requirements import Package, Rules, close, environment, parsed
from sglang_harness.kit.target import Target


def target(*, glibc: str | None = None, python: str = "3.12", **packages: str | None) -> Target:
    return Target.model_validate(
        {
            "schema": 1,
            "python": python,
            "glibc": glibc,
            "torch": "2.11.0+cu130",
            "cuda": "13.0",
            "gpus": [{"capability": "9.0"}],
            "packages": {"torch": "2.11.0", **packages},
        }
    )


def said(_: str) -> None:
    pass


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheel_index.use(monkeypatch, tmp_path / "index", tmp_path / "cache")
    return tmp_path / "index"


def test_the_wheel_for_the_target_is_taken_and_no_other():
    files = [
        "a-1-cp312-cp312-manylinux_2_28_x86_64.whl",
        "a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "a-1-cp311-cp311-manylinux_2_17_x86_64.whl",
        "a-1-cp312-cp312-manylinux_2_17_aarch64.whl",
        "a-1-cp312-cp312-musllinux_1_2_x86_64.whl",
        "a-1-py3-none-any.whl",
        "a-1.tar.gz",
    ]
    assert wheels.best(files, target()) == files[0]
    assert wheels.best(files, target(glibc="2.17")) == files[1]
    assert wheels.best(files, target(python="3.13")) == "a-1-py3-none-any.whl"
    assert wheels.best(files[2:5], target()) is None
    assert wheels.best(["a-1-cp310-abi3-manylinux2014_x86_64.whl"], target()) is not None


def test_a_kit_needs_the_glibc_of_its_most_demanding_wheel():
    files = [
        "a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
        "b-1-cp310-abi3-manylinux2014_x86_64.whl",
        "c-1-py3-none-any.whl",
    ]
    assert wheels.needed_glibc(files) == "2.17"
    assert wheels.needed_glibc([*files, "d-1-cp312-cp312-manylinux_2_34_x86_64.whl"]) == "2.34"
    assert wheels.needed_glibc(files[2:]) is None


def test_what_was_fetched_once_needs_no_index(links: Path):
    wheel = make_wheel(links, "alpha", "1.0")
    package = Locked("alpha", "1.0", digest(wheel), "site")
    fetched = wheels.fetch([package], target(), said)[package.sha256]
    assert fetched.name == wheel.name
    wheel.unlink()
    assert wheels.fetch([package], target(), said) == {package.sha256: fetched}


def test_a_wheel_that_was_cut_short_in_the_cache_is_fetched_again(links: Path):
    wheel = make_wheel(links, "alpha", "1.0")
    package = Locked("alpha", "1.0", digest(wheel), "site")
    fetched = wheels.fetch([package], target(), said)[package.sha256]
    fetched.write_bytes(fetched.read_bytes()[:100])
    again = wheels.fetch([package], target(), said)[package.sha256]
    assert digest(again) == package.sha256


def test_two_versions_of_a_package_are_fetched_for_two_releases(links: Path):
    packages = [
        Locked("alpha", v, digest(make_wheel(links, "alpha", v)), f"site-{v}") for v in ("1", "2")
    ]
    found = wheels.fetch(packages, target(), said)
    assert sorted(found) == sorted(p.sha256 for p in packages)


def test_a_wheel_with_another_hash_is_refused(links: Path):
    make_wheel(links, "alpha", "1.0")
    with pytest.raises(KitError, match=r"The wheel of alpha==1\.0 has another hash"):
        wheels.fetch([Locked("alpha", "1.0", "0" * 64, "site")], target(), said)


def test_no_wheel_for_this_python_is_said_with_what_was_looked_for(links: Path):
    wheel = make_wheel(links, "alpha", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    with pytest.raises(KitError, match=r"no wheel of alpha==1\.0 for Python 3\.12 on x86_64"):
        wheels.fetch([Locked("alpha", "1.0", digest(wheel), "site")], target(), said)


def test_no_network_is_said_in_one_line_without_an_address(
    links: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(KitError, match="The package index cannot be reached") as raised:
        wheels.fetch([Locked("alpha", "1.0", "0" * 64, "site")], target(), said)
    assert "secret" not in str(raised.value)
    assert "127.0.0.1" not in str(raised.value)


def test_uv_looks_where_pip_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "pip.conf"
    limits = tmp_path / "limits.txt"
    limits.write_text("torch<3\n")
    file.write_text(
        "[global]\nindex-url = https://user:word@one.example/simple\n"
        "extra-index-url = https://two.example/simple\n  https://three.example/simple\n"
        f"cert = /certificates.pem\nconstraint = {limits}\n"
        "[download]\nfind-links = /wheels\n[install]\nindex-url = https://no.example\n"
    )
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/mine /yours")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://elsewhere.example")
    settings = index.pip_settings()
    found = index.uv_environment(settings)
    assert found["UV_DEFAULT_INDEX"] == "https://user:word@one.example/simple"
    assert found["UV_INDEX"] == "https://two.example/simple https://three.example/simple"
    assert found["UV_FIND_LINKS"] == "/mine,/yours"
    assert found["SSL_CERT_FILE"] == "/certificates.pem"
    assert index.uv_words(settings) == ["--constraints", str(limits)]


def test_a_lock_is_read_back_as_it_was_written():
    lock = Lock(
        "cpython 3.12, torch 2.11.0, x86_64",
        ("0.5.15", "0.5.23"),
        (
            Locked("alpha", "1.0", "a" * 64, "site"),
            Locked("beta", "2.0.post1", "b" * 64, "site-0.5.15"),
            Locked("beta", "3.0", "c" * 64, "site-0.5.23"),
        ),
        ("triton",),
    )
    again = Lock.parse(lock.text(), "it")
    assert again == lock
    assert [p.version for p in again.of("0.5.23")] == ["1.0", "3.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("alpha==1.0 ", "alpha>=1.0 "), "line 6: 'alpha>=1.0 .*' is not 'NAME==VERSION"),
        (("# site: site", "# site: ../out"), "is not 'NAME==VERSION"),
        (("format 1", "format 2"), "not a lock of a kit of this version"),
        (("# for: ", "# fro: "), "does not say whom it is for"),
        (("alpha==1.0", f"alpha==1.0 --hash=sha256:{'a' * 64}\nalpha==1.0"), "is there twice"),
    ],
)
def test_a_broken_lock_is_refused_with_its_line(change: tuple[str, str], message: str):
    lock = Lock("cpython 3.12", ("0.5.15",), (Locked("alpha", "1.0", "a" * 64, "site"),))
    with pytest.raises(KitError, match=message):
        Lock.parse(lock.text().replace(*change), "it")


def test_a_builder_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels.sys, "executable", "/env/bin/python")
    told = wheels.refused(
        "/env/bin/python: No module named pip\n", Target.read("h100-python3.12-torch2.11-cuda13")
    )
    assert told.message == "/env/bin/python has no pip."
    assert "ensurepip" in str(told.advice)


def test_a_lock_of_another_target_is_refused():
    releases = catalogue().choose("2.11.0", ["0.5.15"])
    lock = Lock("cpython 3.12, torch 2.11.0, x86_64", ("0.5.15",), ())
    lock.fits(target(), releases)
    with pytest.raises(KitError, match=r"The lock is for cpython 3\.12.*kit for cpython 3\.13"):
        lock.fits(target(python="3.13"), releases)
    with pytest.raises(KitError, match=r"of SGLang 0\.5\.15, and .* 0\.5\.15, 0\.5\.23"):
        lock.fits(target(), catalogue().choose("2.11.0", []))


# What packages require of each other.

NOTHING = Rules(frozenset(), frozenset())


def package(name: str, version: str, *requires: str) -> tuple[str, Package]:
    return name, Package(name, version, tuple(parsed(requires)))


def test_requirements_are_followed_through_the_kit_and_end_at_the_target():
    kit = dict(
        [
            package("alpha", "1.0", "Beta_One[fast]>=2", "numpy", "tomli; python_version<'3.11'"),
            package("beta-one", "2.1", "quick; extra == 'fast'", "slow; extra == 'small'"),
            package("quick", "1"),
            package("unused", "1", "nothing-like-it"),
        ]
    )
    closure = close(parsed(["alpha==1.0"]), kit, target(numpy=None, quick="0"), NOTHING)
    assert closure.lacking == []
    assert closure.used == {"alpha", "beta-one", "quick"}
    assert closure.needs == {"numpy"}


def test_every_requirement_that_nothing_satisfies_is_named():
    kit = dict([package("alpha", "1.0", "beta>=3", "gone", "numpy>=3"), package("beta", "2")])
    closure = close(parsed(["alpha", "delta"]), kit, target(numpy="2.0"), NOTHING)
    assert sorted(closure.lacking) == [
        "beta>=3 (alpha requires it): the kit has 2",
        "delta",
        "gone (alpha requires it)",
        "numpy>=3 (alpha requires it): the target has 2.0",
    ]


def test_an_unknown_version_is_fit_unless_sglang_states_one():
    kit = dict([package("sglang", "1", "numpy>=2", "scipy==1.0"), package("other", "1", "pip==1")])
    closure = close(
        parsed(["sglang", "other"]), kit, target(numpy=None, scipy=None, pip=None), NOTHING
    )
    assert closure.lacking == [
        "scipy==1.0 (sglang requires it): the target has one of unknown version"
    ]


def test_a_guest_may_have_other_kernels_and_another_torch_and_nothing_else():
    kit = dict([package("sglang", "1", "torch==2.14.1", "k==2", "numpy==9"), package("k", "1")])
    rules = Rules(frozenset(), frozenset({"torch", "k"}))
    closure = close(parsed(["sglang"]), kit, target(numpy="8"), rules)
    assert closure.lacking == ["numpy==9 (sglang requires it): the target has 8"]
    rules = Rules(frozenset({"numpy"}), frozenset({"torch", "k"}))
    assert close(parsed(["sglang"]), kit, target(numpy="8"), rules).lacking == []


def test_a_local_version_of_torch_is_the_public_one():
    found = target(torch="2.11.0+cu130")
    kit = dict([package("alpha", "1", "torch==2.11.0", "torch<2.12")])
    assert close(parsed(["alpha"]), kit, found, NOTHING).lacking == []


def test_markers_are_answered_for_the_target():
    answers = environment(target(python="3.10.4"))
    assert answers["python_full_version"] == "3.10.4"
    assert (answers["sys_platform"], answers["platform_machine"]) == ("linux", "x86_64")


def test_what_is_no_wheel_is_said(tmp_path: Path):
    broken = tmp_path / "alpha-1-py3-none-any.whl"
    broken.write_bytes(b"no zip")
    with pytest.raises(KitError, match=r"alpha-1-py3-none-any\.whl is not a wheel"):
        Package.of_wheel(broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("alpha.py", "")
    with pytest.raises(KitError, match="is not a wheel"):
        Package.of_wheel(broken)
