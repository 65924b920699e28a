"""Identifies what answers at an address, before it is treated as an SGLang server."""

from __future__ import annotations

from typing import Any, Literal

from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import (
    AttachError,
    BadAnswer,
    NoAnswerInTime,
    Refused,
    Unreachable,
    Unresponsive,
)
from sglang_harness.runtime import Introduction

#: Seconds for each of the two questions; ``/server_info`` hangs when the scheduler is stuck.
PATIENCE = 15.0


def introduce(where: str, api_key: str | None) -> Introduction:
    """Asks the server at the URL ``where`` what it is. Changes nothing.

    Raises:
        AttachError: nothing answers, it requires another key, or it is not SGLang.
        Unresponsive: it is SGLang, and its scheduler does not answer.
    """
    transport = RequestsTransport(where, api_key=api_key, read_timeout=PATIENCE)
    client = Client(transport, timeout=PATIENCE, read_only=True)
    try:
        model = client.model_info()
        try:
            server = client.server_info()
        except NoAnswerInTime as error:
            # It asks the scheduler, /model_info does not (SGLang 0.5.20 to 0.5.23).
            raise Unresponsive(
                f"The server at {where} states its model, but its scheduler does not answer: "
                f"{error.message}.",
                advice="It may be paused, loading or stuck; look at its log.",
            ) from None
    except (Unreachable, NoAnswerInTime) as error:
        raise AttachError(
            f"No server answers at {where}: {error.message}.",
            advice="Check host and port, and that the server has come up.",
        ) from None
    except Refused as error:
        if error.status in (401, 403):
            said = "the one in SGLANG_API_KEY" if api_key else "none"
            raise AttachError(
                f"The server at {where} requires an API key (HTTP {error.status}), and {said} "
                f"was sent.",
                advice="Set its key in the environment variable SGLANG_API_KEY.",
            ) from None
        raise _stranger(where, error.message) from None
    except BadAnswer as error:
        raise _stranger(where, error.message) from None
    finally:
        client.close()
    return _read(where, model, server)


def _read(where: str, model: dict[str, Any], server: dict[str, Any]) -> Introduction:
    for name, told in (("model_path", model), ("version", server)):
        if not isinstance(told.get(name), str) or not told[name]:
            raise _stranger(where, f"it states no {name}")
    device: Literal["cpu", "gpu"] = "cpu" if server.get("device") == "cpu" else "gpu"
    return Introduction(str(server["version"]), str(model["model_path"]), device)


def _stranger(where: str, why: str) -> AttachError:
    return AttachError(
        f"What answers at {where} is not SGLang: {' '.join(why.split())[:120]}.",
        advice="Give the address of the server itself, not of a router or another service.",
    )
