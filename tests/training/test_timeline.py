"""Seconds of nested spans add up to the outermost one's; events are kept on demand and draw one track a rank."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpo_megatron.monitor.timeline import Timeline, chrome_trace


class Clock:
    """Moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_spans_seconds_are_its_own_without_those_of_the_spans_inside():
    clock = Clock()
    timeline = Timeline(clock)
    with timeline.span("step"):
        clock.now += 1
        with timeline.span("update"):
            clock.now += 2
            for _ in range(2):
                with timeline.span("packing"):
                    clock.now += 4
        clock.now += 8
        with timeline.span("packing"):
            clock.now += 16
    assert timeline.take() == {"step": 9, "update": 2, "packing": 24}
    assert timeline.take() == {}


trees = st.recursive(st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3))


@given(trees)
def test_the_seconds_of_all_names_add_up_to_the_outermost_spans(tree):
    clock = Clock()
    timeline = Timeline(clock)

    def run(children):
        clock.now += 1
        for name, inner in children:
            with timeline.span(name):
                run(inner)
            clock.now += 1

    with timeline.span("step"):
        run(tree)
    assert sum(timeline.take().values()) == clock.now - 100


def test_a_span_that_an_exception_leaves_is_closed_and_counted():
    clock = Clock()
    timeline = Timeline(clock)
    with pytest.raises(KeyError), timeline.span("outer"), timeline.span("inner"):
        clock.now += 3
        raise KeyError
    assert timeline.take() == {"inner": 3, "outer": 0}


def test_reading_inside_a_span_is_refused():
    timeline = Timeline()
    with timeline.span("step"), pytest.raises(RuntimeError, match="inside an open span"):
        timeline.take()


def test_events_are_kept_only_where_they_are_asked_for():
    clock = Clock()
    timeline = Timeline(clock)
    with timeline.span("unseen"):
        clock.now += 1
    assert timeline.events is None
    timeline.events = []
    with timeline.span("outer"):
        clock.now += 1
        with timeline.span("inner"):
            clock.now += 1
    assert timeline.events == [("inner", 102, 103, 1), ("outer", 101, 103, 0)]


def test_the_trace_has_one_named_track_a_rank_and_microseconds_from_the_first_begin():
    clocks = [Clock(), Clock()]
    lines = [Timeline(clock) for clock in clocks]
    clocks[1].now += 0.5
    for clock, line in zip(clocks, lines, strict=True):
        line.events = []
        with line.span("step"):
            clock.now += 1
            with line.span("rollout"):
                clock.now += 2
    trace = json.loads(json.dumps(chrome_trace({rank: line.events for rank, line in enumerate(lines)})))
    names = [row["args"]["name"] for row in trace["traceEvents"] if row["name"] == "thread_name"]
    assert names == ["rank 0", "rank 1"]
    spans = [(row["tid"], row["name"], row["ts"], row["dur"]) for row in trace["traceEvents"] if row["ph"] == "X"]
    assert spans == [
        (0, "step", 0.0, 3e6),
        (0, "rollout", 1e6, 2e6),
        (1, "step", 0.5e6, 3e6),
        (1, "rollout", 1.5e6, 2e6),
    ]
    assert chrome_trace({})["traceEvents"][0]["ph"] == "M"
