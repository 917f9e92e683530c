"""Where the seconds of a step go: named spans, nested, by the host's clock.

    step                |---------------------------------------------------------------|
    rollout               |---------------|
    reward                                 |-|
    packing                                   |-|
    forward_backward                            |------------|  |----------|
    packing                                       |-|    |-|      |-|
    optimizer                                                 |-|           |-|

A span's seconds are its OWN: those of the spans inside it are theirs. So the seconds of all names add up to those of
the outermost span exactly, and what no inner span covers (the outermost one's own) is the rest. A span costs about a
microsecond and is always on; begin and end are kept only where ``events`` is set to a list, which :func:`chrome_trace`
turns into a picture.

A span ends when the host leaves it. On a GPU, work that was only launched in it counts where the host waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Event(NamedTuple):
    """``begin`` and ``end`` in seconds of ``time.perf_counter``, which processes of one Linux machine share; ``depth``
    0 is an outermost span."""

    name: str
    begin: float
    end: float
    depth: int


class Timeline:
    """Collects the spans of one rank, in one thread.

    ``events``: None, or the list that every span is appended to when it ends.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.events: list[Event] | None = None
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inside: list[float] = []  # of each open span: seconds of the spans inside it

    def span(self, name: str) -> _Span:
        """A context manager; what runs in it is ``name``'s. Spans nest, also those of one name."""
        return _Span(self, name)

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, nested spans taken out; forgets them. Raises RuntimeError inside a
        span."""
        if self._inside:
            raise RuntimeError("the timeline was read inside an open span: read it after the outermost one has ended")
        taken, self._seconds = self._seconds, {}
        return taken


class _Span:
    __slots__ = ("_begin", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str):
        self._timeline, self._name = timeline, name

    def __enter__(self) -> None:
        self._timeline._inside.append(0.0)
        self._begin = self._timeline._clock()

    def __exit__(self, *exception: object) -> None:
        line, name = self._timeline, self._name
        end = line._clock()
        seconds = end - self._begin
        line._seconds[name] = line._seconds.get(name, 0.0) + seconds - line._inside.pop()
        if line._inside:
            line._inside[-1] += seconds
        if line.events is not None:
            line.events.append(Event(name, self._begin, end, len(line._inside)))


def chrome_trace(events: Mapping[int, Sequence[Event]]) -> dict:
    """``events`` by rank as trace-event JSON, which chrome://tracing and Perfetto open: one track a rank, times in
    microseconds from the first begin."""
    start = min((event.begin for found in events.values() for event in found), default=0.0)
    rows: list[dict] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "training"}}]
    for rank, found in sorted(events.items()):
        rows.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        rows += [
            {
                "ph": "X",
                "name": event.name,
                "pid": 0,
                "tid": rank,
                "ts": (event.begin - start) * 1e6,
                "dur": (event.end - event.begin) * 1e6,
            }
            for event in sorted(found, key=lambda event: (event.begin, event.depth))
        ]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}
