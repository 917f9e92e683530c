"""Jobs side by side, with real processes: a failure is named and costs its dependants only; a stop is passed on,
once."""

import os
import signal
import threading
import time

from dcpo_megatron.comparison.jobs import Jobs, StudyJob


def job(tmp_path, name: str, code: str, needs: str | None = None) -> StudyJob:
    return StudyJob(name, ["-c", code], tmp_path / f"{name}.log", lambda: 0.0, needs)


def test_a_failed_job_is_named_its_dependants_are_not_started_and_the_rest_goes_on(tmp_path, capsys):
    jobs = [
        job(tmp_path, "bad", "print('first'); print('it was the disk'); raise SystemExit(3)"),
        job(tmp_path, "after bad", f"open({str(tmp_path / 'started')!r}, 'w')", needs="bad"),
        job(tmp_path, "good", "pass"),
        job(tmp_path, "after good", f"open({str(tmp_path / 'reached')!r}, 'w')", needs="good"),
    ]
    outcome = Jobs(jobs, [{}, {}]).run()
    assert outcome.left == []
    assert list(outcome.failed) == ["bad", "after bad"]
    assert "exit code 3" in outcome.failed["bad"] and "it was the disk" in outcome.failed["bad"]
    assert "bad failed before it" in outcome.failed["after bad"]
    assert (tmp_path / "reached").exists() and not (tmp_path / "started").exists()
    assert "bad: FAILED" in capsys.readouterr().err


def test_no_more_run_at_a_time_than_there_are_slots_and_each_has_its_own_environment(tmp_path):
    code = (
        "import os, time; s = os.environ['SLOT']; f = os.open(os.environ['HERE'] + '/' + s, os.O_CREAT | os.O_EXCL); "
        "time.sleep(0.2); os.close(f); os.unlink(os.environ['HERE'] + '/' + s)"
    )
    slots = [{"SLOT": str(number), "HERE": str(tmp_path)} for number in range(2)]
    # A slot that were used twice at once would find its file there, and fail.
    assert Jobs([job(tmp_path, f"job {number}", code) for number in range(5)], slots, quiet=True).run().failed == {}


def test_what_a_job_needs_may_have_been_done_before(tmp_path):
    assert Jobs([job(tmp_path, "run", "pass", needs="start")], [{}], quiet=True).run().failed == {}


def test_a_stop_is_passed_on_and_what_was_not_done_is_left(tmp_path):
    saves = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        f"open({str(tmp_path / 'up')!r}, 'w'); time.sleep(60)"
    )
    jobs = [job(tmp_path, "running", saves), job(tmp_path, "waiting", "pass")]

    def stop_when_up():
        deadline = time.monotonic() + 20
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_up).start()
    started = time.monotonic()
    outcome = Jobs(jobs, [{}], quiet=True).run()
    assert outcome.failed == {} and outcome.left == ["running", "waiting"]
    assert time.monotonic() - started < 30
