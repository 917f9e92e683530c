"""One server as a process group of its own: started, asked for its health, ended with everything that it spawned.

start --> running --> healthy            the log is appended to over all starts
            |            |
            +-- died ----+--> kill the rest of the group, start again
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from dcpo_megatron.rollout.server import Server
from dcpo_megatron.rollout.serving.shared_files import SharedFiles

LAST_LINES = 12
# For the guardian in the server, and after that for the kernel.
GUARDIAN_SECONDS = 3.0
GROUP_SECONDS = 10.0


class ServerProcess:
    """A server that can be started, ended and started again on the same address.

    Args:
        words: the command line.
        environment: its variables.
        url: where it answers.
        asked_at: where this host asks it (default: ``url``).
        api_key: goes to it through its standard input.
        log: file for its output, appended to, readable by its owner alone.
    """

    def __init__(
        self,
        words: list[str],
        environment: dict[str, str],
        url: str,
        api_key: str | None,
        log: Path,
        asked_at: str | None = None,
    ):
        self.url, self.log, self._asked_at = url, log, asked_at or url
        self._words, self._environment, self._api_key = words, environment, api_key
        self._process: subprocess.Popen | None = None
        self._log_start = 0
        self._server = Server(self._asked_at, api_key=api_key)
        self._shared = SharedFiles(log.with_suffix(".shared"))

    @property
    def pid(self) -> int:
        """Of the command; also the number of its process group."""
        assert self._process is not None  # nobody asks before start()
        return self._process.pid

    def start(self) -> None:
        """Raises OSError where the command cannot be run or the log not be written."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._shared.remove_left()
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._words,
                env=self._environment,
                # The guardian reads its end: while this process lives, the pipe is open. No other child gets the
                # writing end (it is closed on exec).
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._process.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):  # it has died: poll() says so
            self._process.stdin.write(json.dumps({"api_key": self._api_key}).encode() + b"\n")
            self._process.stdin.flush()

    def exit_code(self) -> int | None:
        """None while it runs (or has not been started)."""
        return None if self._process is None else self._process.poll()

    def samples(self, timeout: float = 5.0) -> bool:
        """Whether it samples a token: true once it has started."""
        found = self._server.generates(timeout)
        if found:
            self._shared.see(self.pid)
        return found

    def answers(self, timeout: float = 5.0) -> bool:
        """Whether its HTTP process answers at all, paused or not."""
        return self._server.alive(timeout)

    def last_lines(self) -> str:
        """The end of the log since the last start, indented."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line[:400]}" for line in lines[-LAST_LINES:])

    def end(self) -> None:
        """Ends the server with its whole group, and waits until nothing of it is left. It is not asked politely: it has
        nothing that could be lost, and would wait for its requests."""
        if self._process is None:
            return
        assert self._process.stdin is not None  # a pipe
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # the guardian does the rest
        deadline = time.monotonic() + GUARDIAN_SECONDS
        signal_number = 0
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline + GROUP_SECONDS:
                self._process.poll()  # a dead leader is a member until it is collected
                if time.monotonic() > deadline:  # there was none, or it hangs
                    signal_number = signal.SIGKILL
                os.killpg(self._process.pid, signal_number)  # raises once the group is empty
                time.sleep(0.02)
        self._process.poll()
        self._shared.remove()
        self._server.close()
        self._server = Server(self._asked_at, api_key=self._api_key)  # holds no connection yet
