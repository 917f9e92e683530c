"""How a checkpoint's writer behaves beside training. What it writes is shown by the runs that resume from it."""

import threading
import time

from dcpo_megatron.checkpoint import saver


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_the_writer_rests_in_proportion_to_its_work_until_it_is_waited_for():
    awaited = threading.Event()
    rest = saver._rests(awaited)
    work(0.02)
    before = time.monotonic()
    rest(0)
    assert time.monotonic() - before >= saver._REST * 0.02
    before = time.thread_time()
    for _ in range(100):  # a little work costs no sleep each time
        rest(0)
    assert time.thread_time() - before < 0.05
    work(0.2)
    threading.Timer(0.05, awaited.set).start()
    before = time.monotonic()
    rest(0)
    assert time.monotonic() - before < saver._REST * 0.2
