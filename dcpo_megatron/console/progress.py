"""How far a long job is: a bar with rate and time left on a terminal, a plain line now and then elsewhere, on standard
error."""

from __future__ import annotations

import sys
import time

LINE_SECONDS = 10.0


class Progress:
    """Context manager whose :meth:`report` takes (bytes done, bytes in all).

    Args:
        title: stands before the bar.
        quiet: shows nothing.
    """

    def __init__(self, title: str, quiet: bool = False):
        self._title, self._quiet, self._bar = title, quiet, None
        self._started = self._said = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, done: int, total: int) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._started, self._said = done, now, now
            if self._bar is not None:
                # What an earlier run did counts in the bar and not in the rate.
                self._task = self._bar.add_task(self._title, total=total, completed=done)
            elif done:
                self._say(f"{size(done)} of {size(total)} were done before")
        elif self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            rate = (done - self._first) / (now - self._started)
            left = f", {size(rate)}/s, {(total - done) / rate:.0f} s left" if rate else ""
            self._say(f"{size(done)} of {size(total)}{left}")

    def _say(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes for people: 1.5 GB is 1,500,000,000 bytes."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count:.0f} bytes"
