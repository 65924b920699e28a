"""The plugin's options and manners, without a server: what is wrong is told before one starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harness import options
from sglang_harness.errors import SpecError
from sglang_harness.pytest_plugin.options import (
    COMMAND_LINE,
    ENVIRONMENT,
    INI,
    gather,
    settle,
)

pytest_plugins = ["pytester"]

OPTIONS = options.at("pytest")


def gathered(command_line=None, ini=None, environment=None):
    return gather((command_line or {}).get, (ini or {}).get, environment or {})


def test_the_command_line_wins_over_ini_over_environment() -> None:
    environment = {"SGLANG_HARNESS_MODEL": "e", "SGLANG_HARNESS_DEVICE": "cpu"}
    given = gathered({"model": "c"}, {"model": "i", "gpus": "0"}, environment)
    assert {n: (g.value, g.source) for n, g in given.items()} == {
        "model": ("c", COMMAND_LINE),
        "gpus": ("0", INI),
        "device": ("cpu", ENVIRONMENT),
    }


@given(
    st.lists(
        st.sampled_from([o.name for o in OPTIONS if o.kind not in ("flag", "list")]), unique=True
    )
)
def test_an_option_means_the_same_wherever_it_is_written(names: list[str]) -> None:
    written = dict.fromkeys(names, "x")
    variables = {o.variable: "x" for o in OPTIONS if o.name in written}
    values = [
        {n: g.value for n, g in found.items()}
        for found in (gathered(written), gathered(None, written), gathered(None, None, variables))
    ]
    assert values[0] == values[1] == values[2]
    assert values[0] == written


def test_an_address_on_the_command_line_overrides_an_image_in_the_ini_file() -> None:
    given = gathered({"url": "http://127.0.0.1:1"}, {"image": "a", "runtime": "docker"})
    assert set(given) == {"url"}
    assert settle(given).runtime.name == "attach"


def test_an_image_on_the_command_line_overrides_an_address_in_the_environment() -> None:
    environment = {"SGLANG_HARNESS_URL": "http://127.0.0.1:1", "SGLANG_HARNESS_SHARE": "/tmp"}
    wanted = settle(gathered({"image": "a"}, None, environment))
    assert (wanted.spec.image, wanted.runtime.name) == ("a", "auto")


def test_a_version_on_the_command_line_overrides_an_image_in_the_ini_file() -> None:
    wanted = settle(gathered({"version": "0.5.20"}, {"image": "a"}))
    assert (wanted.spec.image, wanted.spec.sglang_version) == (None, "0.5.20")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "a", "version": "0.5.20"}, "contradict each other"),
        ({"url": "http://127.0.0.1:1", "image": "a"}, "--sglang-image says how to start one"),
        ({"url": "http://127.0.0.1:1", "runtime": "docker"}, "--sglang-runtime"),
        ({"url": "nowhere"}, "not a valid server URL"),
        ({"runtime": "attach"}, "--sglang-url"),
        ({"allow-changes": True}, "--sglang-url is missing"),
        ({"share": "/tmp"}, "--sglang-url is missing"),
        ({"runtime": "podman"}, "podman"),
        ({"python": "/bin/python", "runtime": "docker"}, "process"),
        ({"start-timeout": "soon"}, "'soon' is not a number of seconds"),
        ({"start-timeout": "-1"}, "start"),
        ({"lease-timeout": "x"}, "--sglang-lease-timeout .* not a number of seconds"),
        ({"server-arg": ["port=3"]}, "set by the harness"),
        ({"spec": "/no/such/file.yaml"}, "cannot be read"),
    ],
)
def test_invalid_option_combinations_are_rejected_with_a_reason(options: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        settle(gathered(options))


def test_a_flag_in_the_environment_has_to_be_a_yes_or_a_no() -> None:
    assert gathered(None, None, {"SGLANG_HARNESS_OWN_SERVER": "1"})["own-server"].value is True
    assert "own-server" not in gathered(None, None, {"SGLANG_HARNESS_OWN_SERVER": "0"})
    with pytest.raises(SpecError, match="SGLANG_HARNESS_OWN_SERVER is 'perhaps'"):
        gathered(None, None, {"SGLANG_HARNESS_OWN_SERVER": "perhaps"})


PLUGIN = ("-p", "no:cacheprovider")
USES_A_SERVER = "def test_x(sglang_server): assert False, 'never runs'"


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(*PLUGIN, *words, timeout=120)


def test_a_contradiction_on_the_command_line_is_one_line_and_nothing_runs(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("def test_x(): pass")
    done = run(pytester, "--sglang-url", "http://127.0.0.1:1", "--sglang-image", "a")
    assert done.ret == 4
    done.stderr.fnmatch_lines(["ERROR: sglang-harness: *--sglang-image says how to start one*"])
    assert "Traceback" not in done.stderr.str()
    assert "passed" not in done.stdout.str()


def test_a_slip_in_the_ini_file_counts_only_where_a_test_uses_a_server(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\nsglang_runtime = podman\n")
    pytester.makepyfile("def test_x(): pass")
    assert run(pytester).ret == 0
    pytester.makepyfile(USES_A_SERVER)
    done = run(pytester)
    assert done.ret == 4
    done.stderr.fnmatch_lines(["ERROR: sglang-harness: *'podman' is unknown*"])


def test_sigterm_gives_back_what_the_run_has_before_it_ends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, signal, time
        import pytest

        @pytest.fixture(scope="session")
        def had(_in_order):
            yield
            os.kill(os.getpid(), signal.SIGTERM)  # a second one interrupts nothing
            print("given back")

        def test_x(had, sglang_servers):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """
    )
    done = run(pytester, "-s")
    assert done.ret == 128 + 15
    done.stdout.fnmatch_lines(["*given back*", "*Exit: SIGTERM*"])


def test_without_a_server_sigterm_is_none_of_the_plugins_business(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import os, signal

        def test_x():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        """
    )
    run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sglang-url", "http://127.0.0.1:9"), "AttachError: No server answers at"),
        (("--sglang-runtime", "docker"), "EngineError: No Docker engine answers at"),
        (("--sglang-model", "./nowhere"), "ModelError: The model ./nowhere does not exist"),
    ],
)
def test_a_server_that_cannot_be_had_is_one_line_a_test(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    pytester.makepyfile(USES_A_SERVER)
    done = run(pytester, *words)
    assert done.ret == 1
    assert told in done.stdout.str()
    assert "During handling" not in done.stdout.str()
    assert "never runs" not in done.stdout.str().replace(USES_A_SERVER, "")
    assert "site-packages" not in done.stdout.str()
    assert 'File "' not in done.stdout.str()


def test_the_workers_of_xdist_tell_a_slip_in_a_line_too(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nsglang_runtime = podman\n")
    pytester.makepyfile(USES_A_SERVER)
    done = run(pytester, "-n", "1")
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*SpecError: --sglang-runtime 'podman' is unknown*"])
    assert "INTERNALERROR" not in done.stdout.str()


def test_without_a_gpu_the_marked_test_is_skipped_with_the_reason_and_starts_nothing(
    pytester: pytest.Pytester,
) -> None:
    from sglang_harness.runtime.device import gpus

    if gpus()[0]:
        pytest.skip("this machine has a GPU")
    pytester.makepyfile(f"import pytest\n@pytest.mark.gpu\n{USES_A_SERVER}")
    done = run(pytester, "-rs", "--strict-markers")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*needs a GPU, and *"])


def test_somebody_elses_marker_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest\n@pytest.mark.gpu\n@pytest.mark.slow\ndef test_x(): assert True"
    )
    run(pytester).assert_outcomes(passed=1)


def test_the_plugin_imports_nothing_heavy_until_it_is_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        HEAVY = "docker requests pydantic torch yaml testcontainers psutil".split()

        def test_x():
            assert not [name for name in HEAVY if name in sys.modules]
        """
    )
    run(pytester, "-p", "no:hypothesispytest").assert_outcomes(passed=1)


@pytest.mark.parametrize("where", ["command line", "ini", "environment"])
def test_an_option_of_one_runtime_is_taken_from_each_source(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    words: tuple[str, ...] = ()
    if where == "command line":
        words = ("--sglang-python", "/nowhere/python")
    elif where == "ini":
        pytester.makeini("[pytest]\nsglang_python = /nowhere/python\n")
    else:
        monkeypatch.setenv("SGLANG_HARNESS_PYTHON", "/nowhere/python")
    pytester.makepyfile(
        "def test_x(sglang_runtime): assert sglang_runtime.name == 'process', sglang_runtime.name"
    )
    done = run(pytester, "-W", "error", *words)
    done.assert_outcomes(passed=1)
