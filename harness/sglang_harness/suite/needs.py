"""What checks can need of a target. Asked of the server, never guessed from its version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_harness.runtime import device
from sglang_harness.server.state import lacks_checksums
from sglang_harness.suite.check import Need

if TYPE_CHECKING:
    from sglang_harness.server import Server


def route(method: str, path: str) -> Need:
    """The server offers a route, by its own ``/openapi.json``."""

    def lacking(server: Server) -> str | None:
        if server.client.has_route(method, path):
            return None
        return f"this SGLang has no {method} {path}"

    return Need(f"{method} {path}", lacking)


def launched_with(flag: str, why: str) -> Need:
    """A launch flag that changes what can be asked for."""

    def lacking(server: Server) -> str | None:
        if server.client.server_info().get(flag.replace("-", "_")):
            return None
        return f"the server was started without --{flag}: {why}"

    return Need(f"--{flag}", lacking)


def _no_gpu(server: Server) -> str | None:
    return None if server.device == "gpu" else "the server runs on a CPU"


GPU = Need("a GPU", _no_gpu)


def _fewer_than_two_devices(server: Server) -> str | None:
    if "devices" not in server.lacks:
        server.lacks["devices"] = None
        if server.device == "gpu":
            if len(device.meant(server.spec.gpus)) < 2:
                server.lacks["devices"] = "needs 2 GPUs"
        elif len(server.running.cores()) < 2:
            server.lacks["devices"] = "needs 2 processor cores"
    return server.lacks["devices"]


TWO_DEVICES = Need("2 GPUs or 2 processor cores", _fewer_than_two_devices)


def _started_by_somebody_else(server: Server) -> str | None:
    if not server.running.owned:
        return "the server was started by somebody else: its start, log and memory are out of sight"
    return None


STARTED_HERE = Need("a server that this run starts", _started_by_somebody_else)


def _no_key(server: Server) -> str | None:
    return None if server.running.api_key else "the server was started without a key"


API_KEY = Need("a server with a key", _no_key)


SHARED_FOLDER = Need("a folder that both sides see", lambda server: server.running.why_no_files())


def _not_its_first_weights(server: Server) -> str | None:
    """On somebody else's server only weights that can be put back are replaced."""
    if server.running.owned or "weights" in server.lacks:
        return server.lacks.get("weights")
    version = str(server.client.model_info().get("weight_version"))
    server.lacks["weights"] = (
        None
        if version == "default"
        else f"somebody pushed weights ({version}), and these could not be put back"
    )
    return server.lacks["weights"]


FIRST_WEIGHTS = Need("weights that can be put back", _not_its_first_weights)


def _no_prefix_cache(server: Server) -> str | None:
    if server.client.server_info().get("disable_radix_cache"):
        return "the server was started with --disable-radix-cache"
    return None


PREFIX_CACHE = Need("a prefix cache", _no_prefix_cache)


CHECKSUMS = Need("checksums of the weights", lacks_checksums)
DISK_UPDATE = route("POST", "/update_weights_from_disk")
TENSOR_UPDATE = route("POST", "/update_weights_from_tensor")
