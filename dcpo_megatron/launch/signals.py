"""Asked to stop: SIGTERM (schedulers, ``docker stop``, the launcher) and SIGUSR1 (a scheduler's warning that time runs
out) are noted, and the run decides when.

A handler only sets a flag. The loop asks for it where a step ends, all ranks agree, a checkpoint is written, and every
rank ends with exit code 75: "start me again", EX_TEMPFAIL of sysexits.h.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from dcpo_megatron.processes import handling, signal_name

# Exit codes, of sysexits.h where it has one.
BAD_INPUT = 2
STOOD_STILL = 70  # EX_SOFTWARE: a watchdog ended the rank
START_AGAIN = 75
INTERRUPTED = 128 + signal.SIGINT
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop while it waited for something that may not come; raised on every rank. ``finished``:
    the responses there were, by place in the requests."""

    def __init__(self, finished: dict | None = None):
        super().__init__("asked to stop")
        self.finished = finished or {}


class StopRequest:
    """Notes SIGTERM and SIGUSR1 from now until :meth:`restore`; a context manager too.

    Python runs handlers in the main thread, between two of its instructions: a signal that comes while a collective
    waits is noted when that returns. Outside the main thread no handler can be installed, and nothing is noted.

    Args:
        announce: say so on standard error when the first signal arrives. One rank's line is enough.
    """

    def __init__(self, announce: bool = True) -> None:
        self._announce = announce
        self._requested: str | None = None
        self._handling = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._handling.enter_context(handling(STOP_SIGNALS, self._note))

    @property
    def requested(self) -> str | None:
        """The first signal that arrived, such as "SIGTERM"; None so far."""
        return self._requested

    def restore(self) -> None:
        """Puts back the handlers that were there before; safe to call twice."""
        self._handling.close()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def _note(self, number: int, frame: object) -> None:
        if self._requested is not None:
            return
        self._requested = signal_name(number)
        if self._announce:
            # Not print: the handler may have interrupted one.
            os.write(2, f"dcpo: {self._requested}: this run stops where the step under way ends\n".encode())
