"""A request to stop, with real signals."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dcpo_megatron.launch.signals import START_AGAIN, StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_said_once_and_nothing_else_happens(name, capfd):
    before = signal.getsignal(getattr(signal, name))
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == name
    assert capfd.readouterr().err == f"dcpo: {name}: this run stops where the step under way ends\n"
    assert signal.getsignal(getattr(signal, name)) is before


def test_only_one_rank_need_say_it(capfd):
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert capfd.readouterr().err == ""


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def look():
        with StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(before, None)]


def test_a_process_finishes_what_it_does_and_says_start_me_again():
    code = """
import sys, time
from dcpo_megatron.launch.signals import START_AGAIN, StopRequest
with StopRequest() as stop:
    print("up", flush=True)
    for step in range(1000):
        time.sleep(0.02)
        if stop.requested: sys.exit(START_AGAIN)
"""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == START_AGAIN == 75
    process.stdout.close()
