"""Secrets do not get into anything that is written down."""

from __future__ import annotations

import json

import pytest

from sglang_harness._base.secrets import REDACTED, SECRET_VARIABLES, Redactor, new_api_key
from sglang_harness.spec import ServerSpec

KEY = "k3y-0f-0ne-server-abcdefgh"


@pytest.fixture(autouse=True)
def _no_secrets_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_key_is_gone_from_text_wherever_it_stands():
    # As SGLang 0.5.23 prints it, in a URL, twice, and glued to other words.
    text = f"server_args={{'api_key': '{KEY}'}} GET /a?key={KEY}&b {KEY}{KEY}"
    cleaned = Redactor(KEY).text(text)
    assert KEY not in cleaned
    assert cleaned == (
        f"server_args={{'api_key': '{REDACTED}'}} GET /a?key={REDACTED}&b {REDACTED}{REDACTED}"
    )


def test_a_key_is_gone_from_data_at_any_depth_and_the_rest_is_as_it_was():
    data = {
        "launch_command": ["--api-key", KEY],
        "states": [{"server_args": {"api_key": KEY, "tp": 1}}, ({"inner": (KEY, None)},)],
        f"by {KEY}": True,
        7: 0.5,
        "none": None,
    }
    cleaned = Redactor(KEY).data(data)
    assert KEY not in json.dumps(cleaned)
    assert cleaned == {
        "launch_command": ["--api-key", REDACTED],
        "states": [{"server_args": {"api_key": REDACTED, "tp": 1}}, [{"inner": [REDACTED, None]}]],
        f"by {REDACTED}": True,
        "7": 0.5,
        "none": None,
    }
    # What was handed in is not changed: a server is still asked with it.
    assert data["launch_command"] == ["--api-key", KEY]


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_secrets_of_the_environment_are_known_without_being_told(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv(name, "hf_ABCDEFGHIJKLMNOP")
    assert Redactor().text("401 for token hf_ABCDEFGHIJKLMNOP") == f"401 for token {REDACTED}"


def test_a_short_value_does_not_black_out_ordinary_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "none")
    assert Redactor("", "key").text("none of the keys") == "none of the keys"


def test_a_secret_that_begins_with_another_leaves_no_tail():
    longer = KEY + "-and-its-tail"
    for known in ((KEY, longer), (longer, KEY)):
        assert Redactor(*known).text(f"a {longer} b {KEY}") == f"a {REDACTED} b {REDACTED}"


def test_characters_that_mean_something_to_patterns_mean_nothing_here():
    odd = r"a+b(c[d\1$^"
    assert Redactor(odd).text(f"<{odd}>") == f"<{REDACTED}>"


def test_keys_are_long_different_and_fit_for_a_header_and_a_shell():
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert len(key) >= 40
        assert key.replace("-", "").replace("_", "").isalnum()
        assert key.isascii()
        # A key that a redactor takes for an ordinary word would not be redacted.
        assert Redactor(key).text(key) == REDACTED


def test_a_spec_knows_every_secret_that_its_server_gets(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("ACME_LICENCE", "licence-0123456789")
    monkeypatch.setenv("ACME_HOME", str(tmp_path))
    spec = ServerSpec.make(
        pass_environment=["ACME_LICENCE", "ACME_HOME", "NOT_SET"],
        environment={"WANDB_API_KEY": "wandb-0123456789", "NCCL_DEBUG": "INFO-0123456789"},
        server_args={
            "ssl-keyfile-password": "keyfile-0123456789",
            "tokenizer-path": "tokenizer-0123456789",
        },
    )
    hidden = ["licence-0123456789", "wandb-0123456789", "keyfile-0123456789", KEY]
    shown = [str(tmp_path), "INFO-0123456789", "tokenizer-0123456789"]
    cleaned = spec.redactor(KEY).text(" ".join([*hidden, *shown]))
    assert cleaned == " ".join([REDACTED] * len(hidden) + shown)


def test_what_is_named_as_a_secret_is_masked_in_the_spec_however_short_it_is():
    spec = ServerSpec.make(
        environment={"DB_PASSWORD": "hunter2", "TOKENIZERS_PARALLELISM": "false"},
        server_args={"ssl-keyfile-password": "abc", "tp-size": 2},
    )
    told = spec.written()
    assert told["environment"] == {"DB_PASSWORD": REDACTED, "TOKENIZERS_PARALLELISM": "false"}
    assert told["server_args"] == {"ssl-keyfile-password": REDACTED, "tp-size": 2}
