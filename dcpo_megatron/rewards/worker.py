"""The process that runs a reward function: ``python -m dcpo_megatron.rewards.worker LIFELINE_FD``. See
``worker_client.py``.

It speaks one JSON object a line. First the client sends ``{"function", "memory_bytes"}`` and gets ``{"ready": true}``
or ``{"refused": sentence}``; then every ``{"response", "ground_truth"}`` gets ``{"value": number}`` or ``{"failure",
"detail"}``. The client kills this process when an answer takes too long. When the client itself dies, the kernel does:
the lifeline is a pipe whose other end only the client holds, and its closing raises SIGIO, which ends the process (and
any it forked) whatever it is doing, also inside a C function that never gives the interpreter back.
"""

import fcntl
import json
import math
import os
import resource
import select
import signal
import sys

from dcpo_megatron.rewards.function import RewardError, load_reward_function
from dcpo_megatron.rewards.worker_client import FOR_THE_TRAINER


def main(lifeline: int) -> None:
    """Serves requests from standard input until it closes."""
    _die_with_client(lifeline)
    _outlive_stop_signals()
    # The function may print or read: give it /dev/null and standard error, and keep the two pipes for the protocol.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(**message: object) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    settings = json.loads(requests.readline() or b"{}")
    if not settings:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], settings["memory_bytes"]))
    try:
        function = load_reward_function(settings["function"])
    except RewardError as error:
        reply(refused=str(error))
        return
    reply(ready=True)
    for line in requests:
        request = json.loads(line)
        try:
            value = function(request["response"], request["ground_truth"])
        except (Exception, SystemExit) as error:
            detail = f"{type(error).__name__}: {error}"
            reply(failure="memory" if isinstance(error, MemoryError) else "exception", detail=detail[:500])
            continue
        reply(**_as_message(value))


def _as_message(value: object) -> dict[str, object]:
    if isinstance(value, (str, bytes)) or value is None:
        return {"failure": "not a number", "detail": f"it returned {value!r:.200}"}
    try:
        number = float(value)  # also NumPy scalars and tensors of one element
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return {"failure": "not a number", "detail": f"it returned a {type(value).__name__}"}
    if not math.isfinite(number):
        return {"failure": "not finite", "detail": f"it returned {number}"}
    return {"value": number}


def _die_with_client(lifeline: int) -> None:
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())  # negative: the whole process group
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    os.set_inheritable(lifeline, False)
    poller = select.poll()  # select.select fails on descriptors above 1023
    poller.register(lifeline, select.POLLIN)
    if poller.poll(0):  # the client died before the signal was armed
        sys.exit(1)


def _outlive_stop_signals() -> None:
    worker = os.getpid()

    def ignore(number: int, frame: object) -> None:
        if os.getpid() != worker:  # a process that the function forked, and may want to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # Handlers, not SIG_IGN and not the mask that came with the start: programs that the function starts would inherit
    # those.
    for number in FOR_THE_TRAINER:
        signal.signal(number, ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_TRAINER)


if __name__ == "__main__":
    main(int(sys.argv[1]))
