"""Why a server ended, out of its log, and how everybody learns of it at once."""

from __future__ import annotations

import threading
import time

import pytest
from scripted_server import A_DEATH, BOUND, Mortal

from sglang_harness.errors import EngineError, ServerDied, ServerLost
from sglang_harness.runtime.death import Death, DeathWatch, Unknown, read_death

#: What every healthy start of 0.5.23 on a CPU writes: full of words that mean nothing.
START = """\
/opt/sglang/lib/python3.11/site-packages/sglang/srt/layers/quantization/awq/awq.py:53: \
UserWarning: Only CUDA, HIP and XPU support AWQ currently.
  warnings.warn(f"Only CUDA, HIP and XPU support AWQ currently.")
[2026-11-23 14:31:19] Fail to set RLIMIT_NOFILE: current limit exceeds maximum limit
[2026-11-23 14:31:19] server_args={'model_path': '/models/tiny', 'disable_cuda_graph': True}
[2026-11-23 14:31:37] Cannot detect CUDA architecture.
[2026-11-23 14:31:37] Ignore import error when loading sglang.srt.models.mamba: cannot import \
name 'causal_conv1d_fn' from 'sglang.srt.layers.attention.mamba.mamba'
[2026-11-23 14:31:38] Ignore import error when loading sglang.srt.models.inkling: \
No module named 'cutlass'
[2026-11-23 14:31:41] INFO:     172.17.0.1:44450 - "GET /ready HTTP/1.1" 503 Service Unavailable
[2026-11-23 14:31:41] The server is fired up and ready to roll!
"""

SCHEDULER_EXCEPTION = """\
[2026-11-23 14:50:39] INFO:     172.17.0.1:38452 - "POST /generate HTTP/1.1" 200 OK
[2026-11-23 14:50:39] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/lib/python3.11/site-packages/sglang/srt/managers/scheduler.py", line 6368, \
in run_scheduler_process
    scheduler.run_event_loop()
  File "/opt/sglang/lib/python3.11/site-packages/torch/nn/functional.py", line 2615, in embedding
    return torch.embedding(weight, input, padding_idx, scale_grad_by_freq, sparse)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
IndexError: index out of range in self

[2026-11-23 14:50:39] SIGQUIT received. signum=None, frame=None. It usually means one child failed.
"""

CUDA_OUT_OF_MEMORY = """\
[2026-11-23 10:02:11 TP0] Load weight begin. avail mem=21.80 GB
[2026-11-23 10:02:14 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/sgl-workspace/sglang/python/sglang/srt/managers/scheduler.py", line 2874, in \
run_scheduler_process
    scheduler = Scheduler(
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total \
capacity of 21.98 GiB of which 1.12 GiB is free.

[2026-11-23 10:02:14] Received sigquit from a child process. It usually means the child failed.
"""

UNKNOWN_FLAG = """\
usage: launch_server.py [-h] --model-path MODEL_PATH [--tokenizer-path TOKENIZER_PATH]
                        [--tokenizer-mode {auto,slow}]
launch_server.py: error: unrecognized arguments: --no-such-flag 3
"""

BAD_VALUE = """\
usage: launch_server.py [-h] --model-path MODEL_PATH
launch_server.py: error: argument --dtype: invalid choice: 'float12' (choose from 'auto', 'half')
"""

MISSING_FILE = """\
[2026-11-23 12:00:01] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/lib/python3.11/site-packages/sglang/srt/configs/model_config.py", line 88
    with open(path) as config:
         ^^^^^^^^^^
FileNotFoundError: [Errno 2] No such file or directory: '/models/mine/config.json'
"""

#: A file of mode 0600 as safetensors' Rust code reports it: no quotes, no errno.
MISSING_TO_SAFETENSORS = """\
[2026-11-23 12:00:01] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/lib/python3.11/site-packages/sglang/srt/model_loader/weight_utils.py", line 700
    with safetensors.safe_open(st_file, framework="pt", device="cpu") as f:
         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
FileNotFoundError: No such file or directory: /models/mine/model.safetensors
"""

NO_MODULE = """\
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/opt/sglang/lib/python3.11/site-packages/sglang/launch_server.py", line 7, in <module>
    from sglang.srt.server_args import prepare_server_args
ModuleNotFoundError: No module named 'sgl_kernel'
"""

TRUNCATED = """\
[2026-11-23 12:00:05] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/lib/python3.11/site-packages/sglang/srt/model_loader/weight_utils.py", line 700
    with safetensors.safe_open(st_file, framework="pt", device="cpu") as f:
safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file \
not fully covered
"""

WRONG_SHARING = """\
[2026-11-23 12:00:05] Scheduler hit an exception: Traceback (most recent call last):
  File "/usr/lib/python3.11/multiprocessing/connection.py", line 760, in answer_challenge
    raise AuthenticationError('digest sent was rejected')
multiprocessing.context.AuthenticationError: digest sent was rejected
"""

KILLED_FROM_OUTSIDE = START + (
    "[2026-11-23 14:31:50] Decode batch, #running-req: 1, #token: 393, token usage: 0.10\n"
)


@pytest.mark.parametrize(
    ("log", "cause", "exception"),
    [
        pytest.param(
            START + CUDA_OUT_OF_MEMORY,
            "the GPU ran out of memory",
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
            id="CUDA out of memory",
        ),
        pytest.param(
            UNKNOWN_FLAG, "does not know a flag (--no-such-flag 3)", "", id="an unknown flag"
        ),
        pytest.param(
            BAD_VALUE,
            "a value that SGLang does not take (--dtype: invalid choice: 'float12'",
            "",
            id="a bad value",
        ),
        pytest.param(
            START + MISSING_FILE,
            "(/models/mine/config.json)",
            "FileNotFoundError: [Errno 2] No such file",
            id="a missing file",
        ),
        pytest.param(
            START + MISSING_TO_SAFETENSORS,
            "(/models/mine/model.safetensors)",
            "FileNotFoundError: No such file",
            id="weights that the server's user may not read",
        ),
        pytest.param(
            NO_MODULE,
            "lacks a Python module (No module named 'sgl_kernel')",
            "ModuleNotFoundError: No module named 'sgl_kernel'",
            id="a missing module",
        ),
        pytest.param(
            START + TRUNCATED,
            "a safetensors file is damaged or cut short",
            "safetensors_rust.SafetensorError: Error while deserializing",
            id="truncated weights",
        ),
        pytest.param(
            START + WRONG_SHARING,
            "share by file_system",
            "multiprocessing.context.AuthenticationError",
            id="a tensor sent by file descriptor",
        ),
    ],
)
def test_a_known_cause_is_named_in_words_a_person_can_act_on(log: str, cause: str, exception: str):
    death = read_death(137, False, log)
    assert cause in death.cause
    assert death.exception.startswith(exception)
    assert cause in death.sentence()


def test_a_scheduler_that_hit_an_exception_is_explained_by_that_exception():
    # Nothing in the noise of a healthy start may be taken for the cause.
    death = read_death(0, False, START + SCHEDULER_EXCEPTION)
    assert death.cause == ""
    assert death.exception == "IndexError: index out of range in self"
    assert "IndexError: index out of range in self" in death.sentence()
    assert "SIGQUIT received" in death.advice()


@pytest.mark.parametrize("exit_code", [0, 137, None])
def test_exit_codes_are_told_and_not_believed(exit_code: int | None):
    # 0 where the server is process 1, 137 under an init process: both were seen for crashes.
    text = read_death(exit_code, False, START + SCHEDULER_EXCEPTION).sentence()
    assert "IndexError" in text
    assert "memory" not in text
    assert ("unknown" if exit_code is None else str(exit_code)) in text
    assert "\n" not in text


def test_a_healthy_log_that_just_ends_is_not_given_a_cause():
    death = read_death(137, False, KILLED_FROM_OUTSIDE)
    assert (death.cause, death.exception) == ("", "")
    assert death.sentence() == "The server ended (exit code 137): its log names no exception."
    assert "Decode batch" in death.advice()


def test_the_kernels_word_on_memory_outranks_whatever_the_log_says():
    death = read_death(137, True, START + TRUNCATED)
    assert death.sentence() == ("The server was killed by the kernel because it ran out of memory.")
    assert "memory limit" in death.advice()


def test_a_gpu_without_memory_is_not_mixed_up_with_a_host_without():
    text = read_death(137, False, CUDA_OUT_OF_MEMORY).sentence()
    assert "the GPU ran out of memory" in text
    assert "kernel" not in text


def test_a_server_that_wrote_nothing_is_said_to_have_written_nothing():
    for log in ("", "\n  \n"):
        death = read_death(1, False, log)
        assert death.last_words == ()
        assert "exit code 1" in death.sentence()
        assert death.advice() == "It wrote nothing to its log."


def test_the_last_words_are_few_and_in_their_order():
    log = "\n".join(f"line {n}" for n in range(1000))
    death = read_death(1, False, log)
    assert death.last_words[-1] == "line 999"
    assert len(death.last_words) < 20
    assert "line 997 | line 998 | line 999" in death.advice()


def test_a_cause_outranks_the_exception_that_followed_it():
    later = CUDA_OUT_OF_MEMORY + "RuntimeError: Rank 0 scheduler died\n"
    death = read_death(137, False, later)
    assert death.exception == "RuntimeError: Rank 0 scheduler died"
    assert "the GPU ran out of memory" in death.sentence()
    assert "Rank 0" not in death.sentence()


SURVIVED = """\
[2026-11-23 14:56:50] check_weights see error: Torch not compiled with CUDA enabled
Traceback (most recent call last):
  File "/opt/sglang/lib/python3.11/site-packages/torch/cuda/__init__.py", line 522, in _lazy_init
    raise AssertionError("Torch not compiled with CUDA enabled")
AssertionError: Torch not compiled with CUDA enabled
[2026-11-23 14:56:50] INFO:     172.17.0.1:50358 - "POST /weights_checker HTTP/1.1" 400 Bad Request
"""

MISSING_BUT_REFUSED = """\
[2026-11-23 14:40:00] Failed to load weights: [Errno 2] No such file or directory: '/exchange/gone'
[2026-11-23 14:40:00] INFO:     172.17.0.1:1 - "POST /update_weights_from_disk HTTP/1.1" 400 \
Bad Request
"""


def test_a_failure_that_the_server_survived_is_not_what_it_died_of():
    death = read_death(137, False, START + MISSING_BUT_REFUSED + SCHEDULER_EXCEPTION)
    assert "IndexError: index out of range in self" in death.sentence()


def test_an_exception_that_the_server_survived_is_not_what_it_died_of():
    after = "".join(
        f'[2026-11-23 14:57:{n:02}] INFO:     172.17.0.1:1 - "POST /generate HTTP/1.1" 200 OK\n'
        for n in range(60)
    )
    death = read_death(137, False, START + SURVIVED + after)
    assert "Torch not compiled" not in death.sentence()


def test_the_last_words_are_the_servers_and_not_its_librarys():
    leaks = (
        "nanobind: leaked 4 instances!\n"
        + ' - leaked instance 0x7fabbe602668 of type "triton._C.libtriton.ir.attribute"\n' * 4
        + "nanobind: leaked 64 types!\n"
        + ' - leaked type "triton._C.libtriton.ir.location"\n' * 11
        + " - ... skipped remainder\nSee https://nanobind.readthedocs.io/en/latest/refleaks.html\n"
    )
    death = read_death(137, False, START + SCHEDULER_EXCEPTION + leaks)
    assert "SIGQUIT received" in death.advice()


# --- the watch ----------------------------------------------------------------------------------


def test_a_wait_ends_when_the_server_does_and_not_later():
    mortal = Mortal()
    threading.Timer(0.2, mortal.die).start()
    began = time.monotonic()
    assert mortal.watch.wait(BOUND) == A_DEATH
    assert 0.15 < time.monotonic() - began < 2.0


def test_a_wait_for_a_server_that_lives_lasts_as_long_as_it_was_asked_to():
    watch = Mortal().watch
    began = time.monotonic()
    assert watch.wait(0.2) is None
    assert time.monotonic() - began >= 0.19
    assert watch.death is None


def test_an_end_that_was_asked_for_is_no_death():
    mortal = Mortal()
    mortal.watch.expected = True
    mortal.die()
    assert mortal.watch.wait(BOUND) is None
    assert mortal.watch.death is None


def test_listeners_are_called_once_whether_they_come_before_the_death_or_after():
    mortal = Mortal()
    calls: list[str] = []
    heard = threading.Event()

    def early() -> None:
        calls.append("early")
        heard.set()

    mortal.watch.call_on_end(early)
    assert calls == []
    mortal.die()
    assert heard.wait(BOUND)
    mortal.watch.call_on_end(lambda: calls.append("late"))
    assert calls == ["early", "late"]


def test_a_listener_can_ask_how_the_server_died():
    mortal = Mortal()
    seen: list[Death | None] = []
    heard = threading.Event()
    mortal.watch.call_on_end(lambda: (seen.append(mortal.watch.death), heard.set()))
    mortal.die()
    assert heard.wait(BOUND)
    assert seen == [A_DEATH]


def unwatched(reason: str = "the Docker engine stopped answering") -> DeathWatch:
    """Of a server that can no longer be observed."""
    watch = DeathWatch(lambda: Unknown(reason))
    over = threading.Event()
    watch.call_on_end(over.set)
    assert over.wait(BOUND)
    return watch


def test_a_server_that_cannot_be_observed_is_not_dead_and_whoever_waits_is_told():
    watch = unwatched()
    assert watch.death is None
    assert watch.ended == Unknown("the Docker engine stopped answering")
    for ask in (lambda: watch.wait(0.0), watch.raise_if_ended):
        with pytest.raises(ServerLost, match="stopped answering") as lost:
            ask()
        assert lost.value.unknown == watch.ended
        assert isinstance(lost.value, EngineError)
        assert not isinstance(lost.value, ServerDied)


def test_a_wait_that_fails_is_noticed_by_everyone_who_waits():
    def fails() -> Death:
        raise KeyError("OOMKilled")

    heard = threading.Event()
    watch = DeathWatch(fails)
    watch.call_on_end(heard.set)
    assert heard.wait(BOUND)
    with pytest.raises(ServerLost, match=r"can no longer be watched \(KeyError: 'OOMKilled'\)"):
        watch.wait(BOUND)


def test_an_end_that_was_asked_for_is_not_a_lost_server_either():
    watch = unwatched()
    watch.expected = True
    assert watch.wait(0.0) is None
    assert watch.ended is None
    watch.raise_if_ended()


def test_asking_whether_it_ended_raises_its_death_and_nothing_while_it_lives():
    mortal = Mortal()
    mortal.watch.raise_if_ended()
    mortal.die()
    assert mortal.watch.wait(BOUND) == A_DEATH
    with pytest.raises(ServerDied):
        mortal.watch.raise_if_ended()


def test_a_listener_that_fails_keeps_the_next_from_nothing():
    mortal = Mortal()
    heard = threading.Event()
    mortal.watch.call_on_end(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    mortal.watch.call_on_end(heard.set)
    mortal.die()
    assert heard.wait(BOUND)
