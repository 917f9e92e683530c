"""Child processes: what starting, watching and ending them has in common. Who owns some decides when they end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Callable) -> Iterator[None]:
    """Within it ``handler(number, frame)`` is called at these signals; behind it the handlers of before are back. In
    the main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def signal_name(number: int) -> str:
    """ "SIGTERM"; "signal 99" where there is none of that number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """For ``preexec_fn``, what a child does between fork and exec: it asks the kernel for SIGKILL when ``parent`` is
    gone. None where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before the question
            os.kill(os.getpid(), signal.SIGKILL)

    return ask
