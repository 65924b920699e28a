"""What is asked for is checked once, at the door, and a mistake is told in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_harness.errors import SpecError
from sglang_harness.spec import CPU_ARGUMENTS, ServerSpec, command_line


def refused(**fields: Any) -> str:
    """The message that refuses ``fields``: one line that says what to do."""
    with pytest.raises(SpecError) as caught:
        ServerSpec.make(**fields)
    assert "\n" not in str(caught.value)
    assert caught.value.advice
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "spec.yaml"


def refused_file(file: Path, content: str | bytes, **overrides: Any) -> str:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as caught:
        ServerSpec.from_yaml(file, **overrides)
    text = str(caught.value)
    assert text.startswith(f"{file}:")
    assert "\n" not in text
    return text


# --- fields -------------------------------------------------------------------------------------


def test_what_nobody_sets_is_safe():
    spec = ServerSpec.make()
    assert spec.publish_on == "127.0.0.1"
    assert spec.port is None
    assert spec.pull == "missing"
    assert spec.environment == {}
    assert spec.server_args == {}
    # A token is handed on from the environment, never written into a spec.
    assert spec.pass_environment == ["HF_TOKEN"]
    # SGLang allows its scheduler 15 s to end; Docker's own default of 10 would cut it off.
    assert spec.limits.stop > 15


def test_two_specs_do_not_share_their_defaults():
    one, other = ServerSpec.make(), ServerSpec.make()
    one.server_args["tp-size"] = 2
    one.pass_environment.append("MINE")
    assert (other.server_args, other.pass_environment) == ({}, ["HF_TOKEN"])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modle": "tiny"}, "modle"),
        ({"limits": {"strat": 5}}, "limits.strat"),
        ({"pull": "sometimes"}, "pull"),
        ({"device": "tpu"}, "device"),
        ({"port": 0}, "port"),
        ({"port": 70000}, "port"),
        ({"port": "http"}, "port"),
        ({"limits": {"start": 0}}, "limits.start"),
        ({"limits": {"start": -1}}, "limits.start"),
        ({"limits": {"request": math.nan}}, "limits.request"),
        ({"limits": 5}, "limits"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": " tiny"}, "model"),
        ({"image": "   "}, "image"),
        ({"environment": {"A": 1}}, "environment.A"),
        ({"pass_environment": "HF_TOKEN"}, "pass_environment"),
        ({"server_args": {"tp-size": None}}, "server_args.tp-size"),
        ({"server_args": {"lora-paths": [1, 2]}}, "server_args.lora-paths"),
        ({"server_args": ["tp-size"]}, "server_args"),
        ({"hub_cache": 7}, "hub_cache"),
    ],
)
def test_a_field_that_cannot_be_meant_is_named(fields: dict[str, Any], named: str):
    assert named in refused(**fields)


def test_every_mistake_is_told_and_not_the_first_alone():
    text = refused(pull="sometimes", port=0, colour="red")
    assert all(name in text for name in ("pull", "port", "colour"))


@pytest.mark.parametrize(
    "name", ["host", "--host", "port", "model_path", "model-path", "--api-key", "api_key", "device"]
)
def test_flags_that_the_harness_sets_itself_cannot_be_set_again(name: str):
    # A second --host would open the server, a second --api-key would lock the harness out.
    text = refused(server_args={name: "x"})
    assert name.lstrip("-").replace("_", "-") in text


def test_an_image_and_a_version_to_build_contradict_each_other():
    text = refused(image="lmsysorg/sglang:v0.5.22", sglang_version="0.5.23")
    assert "image" in text
    assert "sglang_version" in text


@pytest.mark.parametrize("size", ["512m", "16g", "1G", "1073741824", "64k"])
def test_sizes_are_written_as_the_engine_takes_them(size: str):
    assert ServerSpec.make(shm_size=size, memory=size).memory == size


@pytest.mark.parametrize("size", ["", "g", "16 g", "1.5g", "-1g", "16gb", "1g\n", "lots"])
def test_other_sizes_are_refused_before_the_engine_sees_them(size: str):
    assert "shm_size" in refused(shm_size=size)
    assert "memory" in refused(memory=size)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"limits": {"request": math.inf}}, "limits.request", id="infinite seconds"),
        pytest.param({"publish_on": ""}, "publish_on", id="no address, which Docker takes for all"),
        pytest.param({"gpus": ""}, "gpus", id="no GPU by name"),
        pytest.param({"server_args": {"": True}}, "server_args", id="a flag without a name"),
        pytest.param({"sglang_version": "latest; rm"}, "sglang_version", id="no version"),
    ],
)
def test_a_field_that_fails_only_later_is_refused_at_the_door(fields: dict[str, Any], why: str):
    assert why in refused(**fields)


# --- a file -------------------------------------------------------------------------------------


def test_a_file_gives_every_kind_of_field(file: Path):
    file.write_text(
        "model: tiny:3\n"
        "server_args:\n"
        "  mem_fraction_static: 0.5\n"
        "  --tp-size: 1\n"
        "  enable-lora: yes\n"
        "  lora-target-modules: [q_proj, k_proj]\n"
        "limits: {start: 1800}\n"
        "hub_cache: /data/hub\n"
    )
    spec = ServerSpec.from_yaml(file)
    assert spec.model == "tiny:3"
    assert spec.server_args == {
        "mem-fraction-static": 0.5,
        "tp-size": 1,
        "enable-lora": True,
        "lora-target-modules": ["q_proj", "k_proj"],
    }
    assert (spec.limits.start, spec.limits.stop) == (1800.0, ServerSpec.make().limits.stop)
    assert spec.hub_cache == Path("/data/hub")


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "---\n", "null\n"])
def test_an_empty_file_is_all_defaults(file: Path, content: str):
    file.write_text(content)
    assert ServerSpec.from_yaml(file) == ServerSpec.make()


def test_what_is_given_wins_over_the_file_and_flags_are_merged(file: Path):
    file.write_text("model: tiny\nport: 31000\nserver_args: {tp_size: 1, dtype: half}\n")
    spec = ServerSpec.from_yaml(
        file, model="smollm2", server_args={"tp-size": 2, "log-level": "debug"}
    )
    assert (spec.model, spec.port) == ("smollm2", 31000)
    assert spec.server_args == {"tp-size": 2, "dtype": "half", "log-level": "debug"}


def test_a_given_image_contradicts_a_version_in_the_file(file: Path):
    assert "contradict" in refused_file(file, "sglang_version: 0.5.22\n", image="mine:1")


def test_a_file_that_is_not_there_or_is_a_folder_is_told_as_such(tmp_path: Path):
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(SpecError, match=reason) as caught:
            ServerSpec.from_yaml(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\xff", "UTF-8", id="a picture"),
        pytest.param(b"model: tiny\x00", "YAML", id="control characters"),
        pytest.param("model: tiny\nport: [1\nimage: a\n", "line 3", id="an open bracket"),
        pytest.param("model: tiny\n\tport: 1\n", "line 2", id="a tab"),
        pytest.param("a: b: c\n", "line 1", id="two colons"),
        pytest.param("model: *nothing\n", "line 1", id="an alias of nothing"),
        pytest.param(
            "model: !!python/object:os.system x\n", "line 1", id="a tag that would run code"
        ),
        pytest.param("- model\n- tiny\n", "list", id="a list"),
        pytest.param("just words\n", "str", id="words"),
        pytest.param("7\n", "int", id="a number"),
        pytest.param("server_args: [tp-size]\n", "server_args", id="flags as a list"),
        pytest.param("server_args: tp-size\n", "server_args", id="flags as words"),
        pytest.param("server_args: {host: 0.0.0.0}\n", "host", id="a flag of the harness's"),
        pytest.param("model: 7\n", "model", id="a model that is a number"),
        pytest.param("limits: [1]\n", "limits", id="limits as a list"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_the_place(
    file: Path, content: str | bytes, told: str
):
    assert told in refused_file(file, content)


def test_flags_that_are_no_mapping_are_refused_whatever_else_is_given(file: Path):
    # Not a TypeError from an attempt to merge the two.
    assert "server_args" in refused_file(file, "server_args: [tp-size]\n", port=31000)


MISTAKES_THAT_ESCAPE = [
    pytest.param("1: 2\n", id="a field that is a number"),
    pytest.param("null: 1\n", id="a field that is nothing"),
    pytest.param("cls: x\n", id="a field called cls"),
    pytest.param("port: 2024-99-99\n", id="a date that there is not"),
    pytest.param("[" * 1000, id="brackets without end"),
    pytest.param('"a\\nb": 1\n', id="a field of two lines"),
    pytest.param("server_args: []\n", id="an empty list of flags"),
    pytest.param("server_args: 0\n", id="no flags but a zero"),
]


@pytest.mark.parametrize("content", MISTAKES_THAT_ESCAPE)
def test_a_stranger_file_is_refused_in_one_line_too(file: Path, content: str):
    refused_file(file, content)


def test_flags_that_are_no_mapping_are_refused_even_where_flags_are_given(file: Path):
    refused_file(file, "server_args: [tp-size]\n", server_args={"tp-size": 2})


FIELDS = sorted(ServerSpec.model_fields)

json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["gpu", "never", "tiny", "16g", "host", "--api-key"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)
# 'cls' is among the mistakes that escape, above.
names = st.sampled_from([*FIELDS, "self", "path"]) | st.text(max_size=12).filter("cls".__ne__)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fields=st.dictionaries(names, json_like, max_size=5))
def test_any_mapping_in_a_file_is_a_spec_or_a_spec_error(tmp_path: Path, fields: dict[str, Any]):
    file = tmp_path / "any.yaml"
    file.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    try:
        spec = ServerSpec.from_yaml(file)
    except SpecError:
        return
    # What was let in is fit for both devices' command lines: words, and nothing else.
    for device in ("cpu", "gpu"):
        assert all(isinstance(word, str) for word in command_line(spec.arguments(device)))


# --- SGLang's command line ----------------------------------------------------------------------


def test_flags_become_words_in_their_order():
    assert command_line(
        {
            "tp-size": 1,
            "mem-fraction-static": 0.5,
            "enable-lora": True,
            "lora-target-modules": ["q_proj", "k_proj"],
            "log-level": "info",
        }
    ) == [
        *("--tp-size", "1"),
        *("--mem-fraction-static", "0.5"),
        "--enable-lora",
        *("--lora-target-modules", "q_proj", "k_proj"),
        *("--log-level", "info"),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_the_numbers_zero_and_one_are_no_flags(number: int):
    # In Python 1 == True; '--tp-size' without its value would end the server.
    spec = ServerSpec.make(server_args={"tp-size": number})
    assert command_line(spec.arguments("gpu")) == ["--tp-size", str(number)]
    # The same after the way that options of the command line take.
    again = ServerSpec.make(**spec.model_dump())
    assert command_line(again.arguments("gpu")) == ["--tp-size", str(number)]


def test_a_cpu_gets_what_it_needs_and_a_gpu_is_left_as_its_users_run_it():
    spec = ServerSpec.make()
    assert spec.arguments("cpu") == CPU_ARGUMENTS
    assert spec.arguments("gpu") == {}


def test_a_flag_of_the_spec_wins_and_false_takes_a_default_away():
    spec = ServerSpec.make(
        server_args={"dtype": "bfloat16", "sleep_on_idle": False, "enable-lora": False}
    )
    arguments = spec.arguments("cpu")
    assert arguments["dtype"] == "bfloat16"
    assert "sleep-on-idle" not in arguments
    assert "enable-lora" not in arguments
    words = command_line(arguments)
    assert words.count("--dtype") == 1
    assert "False" not in words
    # The defaults themselves are as they were for the next spec.
    assert ServerSpec.make().arguments("cpu")["sleep-on-idle"] is True
