"""What a group over NCCL needs of its two sides before it is made, and how it is made so that a deadline can end it.

                       trainer                      server                              where they differ
    version            torch.cuda.nccl.version()    GET /dcpo_environment (dcpo serve)  NCCL refuses the group:
                                                                                        "Mismatched NCCL version"
    NCCL_CUMEM_ENABLE  "0", unless the user set it  "0", unless the user set it         the two sides open each other's
                                                                                        buffers in other ways

Sources: SGLang 0.5.20 (`entrypoints/engine.py`, `_set_envs_and_config`), NCCL (`init.cc`), torch 2.13
(`ProcessGroupNCCL`).
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server

CUMEM = "NCCL_CUMEM_ENABLE"
ENVIRONMENT = "/dcpo_environment"
WAY_OUT = "set publish.mode=disk"
# What a version of SGLang brings along, through the torch that it pins: (first, last, NCCL). Its environment may have
# been changed since.
_PINNED = (
    ((0, 5, 12), (0, 5, 16), (2, 28, 9)),
    ((0, 5, 18), (0, 5, 20), (2, 29, 7)),
    ((0, 5, 23), (0, 5, 23), (2, 30, 7)),
)


def settle_cumem(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Sets NCCL_CUMEM_ENABLE to "0", as SGLang does, where it is not set; before NCCL's first call, on every rank.
    Returns a warning where the user's value is another."""
    value = environment.setdefault(CUMEM, "0")
    if value == "0":
        return None
    return (
        f"{CUMEM}={value} is set: SGLang takes 0 where it is not set, so start the servers with {CUMEM}={value} too, or"
        " unset it here"
    )


def compare(server: Server, info: dict, seconds: float) -> str:
    """Refuses a server whose NCCL cannot make a group with ours. ``info``: its ``/server_info``.

    Returns what may be the reason if the group fails all the same, for a server that does not tell its NCCL (one that
    `dcpo serve` did not start); "" where there is none.

    Raises:
        RolloutError: another version of NCCL, or another NCCL_CUMEM_ENABLE.
    """
    told = server.get(ENVIRONMENT, timeout=seconds) if server.offers(ENVIRONMENT) else {}
    ours, theirs = _version(torch.cuda.nccl.version()), _version(told.get("nccl") or ())
    if theirs and theirs != ours:
        raise RolloutError(
            f"{server.url} runs NCCL {theirs}, the trainer {ours} (torch {torch.__version__}), and NCCL makes no group"
            f" of two versions: give both the same torch, or {WAY_OUT}"
        )
    cumem = told.get(CUMEM) or ("1" if info.get("enable_symm_mem") else None)
    if cumem is not None and cumem != os.environ.get(CUMEM):
        raise RolloutError(
            f"{server.url} runs with {CUMEM}={cumem}, the trainer with {CUMEM}={os.environ.get(CUMEM)}: start both with"
            f" the same, or {WAY_OUT}"
        )
    pinned = _version(_pinned(str(info.get("version"))))
    if theirs or not pinned or pinned == ours:
        return ""
    return (
        f"; SGLang {info['version']} comes with NCCL {pinned}, the trainer runs {ours}: if the server's is its own"
        f" still, {WAY_OUT}"
    )


def options(timeout: datetime.timedelta) -> dist.ProcessGroupNCCL.Options:
    """Of a group whose communicator can be aborted while it waits for the server: NCCL's calls return at once, and
    torch waits beside them."""
    made = dist.ProcessGroupNCCL.Options()
    made.config.blocking = 0
    made._timeout = timeout
    return made


def bound_waiting(seconds: float) -> None:
    """How long torch waits for a communicator of :func:`options`, holding the lock that an abort needs; its own default
    is half an hour. Read once in a process."""
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(math.ceil(seconds)))


@contextmanager
def errors_stay_here() -> Iterator[None]:
    """While a group is made, whose failures are ours to handle: torch reads these variables in the group's constructor.

    By default a watchdog thread looks at a group's broadcasts, and a server that dies or is late ends the trainer: at
    once, or through the default group's monitor eight minutes later, whatever the error handling says. With
    TORCH_NCCL_BLOCKING_WAIT the group has no watchdog, and ``wait`` raises; 2: clean up, end nothing.
    """
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _pinned(sglang: str) -> tuple[int, ...]:
    parts = sglang.split(".")[:3]
    if not all(part.isdecimal() for part in parts):
        return ()
    version = tuple(int(part) for part in parts)
    return next((nccl for first, last, nccl in _PINNED if first <= version <= last), ())


def _version(numbers) -> str:
    return ".".join(str(number) for number in tuple(numbers)[:3])
