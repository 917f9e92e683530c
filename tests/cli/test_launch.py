"""The launcher with real processes and real signals. The ranks are small scripts: nothing here needs a process
group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """\
import os, pathlib, signal, sys, time
here, rank = pathlib.Path({folder!r}), int(os.environ["RANK"])
def note(name):
    part = here / f".{{name}}-{{rank}}"
    part.write_text(str(os.getpid()))
    part.rename(here / f"{{name}}-{{rank}}")
"""


class Launched:
    """``run_ranks`` of a script, in a process of its own."""

    def __init__(self, folder: Path, body: str, count: int = 2, place: str = "None", **environment: str):
        self.folder, self.count = folder, count
        script = folder / "rank.py"
        script.write_text(PRELUDE.format(folder=str(folder)) + body)
        code = (
            f"import sys; from dcpo_megatron.launch.local import Place, run_ranks; sys.exit(run_ranks({count},"
            f" [{str(script)!r}], place={place}))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, name: str = "up") -> list[int]:
        """Process ids, once every rank has noted ``name``."""
        files = [self.folder / f"{name}-{rank}" for rank in range(self.count)]
        wait_until(lambda: all(file.is_file() for file in files))
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        try:
            _, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, err


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


WAIT = "note('up')\ntime.sleep(300)\n"


def test_ranks_that_end_well_give_zero_and_see_the_variables_of_torchrun(tmp_path):
    body = "names = ('LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS')\n"
    body += "(here / f'seen-{rank}').write_text(' '.join(os.environ[name] for name in names))\n"
    assert Launched(tmp_path, body, OMP_NUM_THREADS="3").end() == (0, "")
    seen = [(tmp_path / f"seen-{rank}").read_text().split() for rank in (0, 1)]
    assert [row[0] for row in seen] == ["0", "1"]
    assert seen[0][1:] == seen[1][1:] and seen[0][1:4] == ["2", "2", "127.0.0.1"] and seen[0][5] == "3"


def test_a_hosts_ranks_are_numbered_after_those_of_the_hosts_before_it(tmp_path):
    body = "names = ('LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
    body += (
        "(here / f'seen-{rank}').write_text(' '.join(os.environ[name] for name in names))\nsys.exit(7 if rank == 5"
        " else 0)"
    )
    code, err = Launched(tmp_path, body, place="Place(3, 2, 'fd00::1', 29500)").end()
    assert (code, err) == (7, "dcpo: error: rank 5 of 6 ended with exit code 7; its own message is above\n")
    seen = [(tmp_path / f"seen-{rank}").read_text() for rank in (4, 5)]
    assert seen == ["0 6 2 fd00::1 29500", "1 6 2 fd00::1 29500"]


def test_a_killed_rank_is_named_and_the_others_end_within_seconds(tmp_path):
    launched = Launched(tmp_path, WAIT)
    pids = launched.pids()
    started = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, err = launched.end()
    assert code == 128 + 9 and time.monotonic() - started < 9
    assert err == "dcpo: error: rank 1 of 2 was killed by signal 9 (SIGKILL)\n"
    assert not is_running(pids[0])


def test_a_rank_that_fails_is_named_and_its_code_is_the_launchers(tmp_path):
    code, err = Launched(tmp_path, "sys.exit(7) if rank == 1 else time.sleep(300)").end()
    assert code == 7
    assert err == "dcpo: error: rank 1 of 2 ended with exit code 7; its own message is above\n"


def test_bad_input_is_left_to_the_rank_that_said_it_and_a_rank_that_stays_is_killed(tmp_path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('up')\n"
    body += "while not (here / 'up-0').exists() or not (here / 'up-1').exists(): time.sleep(0.05)\n"
    launched = Launched(tmp_path, body + "sys.exit(2) if rank == 0 else time.sleep(300)")
    pids = launched.pids()
    assert launched.end() == (2, "")
    assert not is_running(pids[1])


@pytest.mark.parametrize(("codes", "expected"), [([75, 75], 75), ([0, 75], 75), ([75, 3], 3)])
def test_start_again_is_passed_up_unless_a_rank_failed(tmp_path, codes, expected):
    code, err = Launched(tmp_path, f"time.sleep(0.5 * rank)\nsys.exit({codes}[rank])").end()
    assert code == expected
    assert ("error" in err) == (expected == 3)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_passed_on_to_every_rank_once_and_waited_for(tmp_path, name):
    body = f"""\
got = []
signal.signal(signal.{name}, lambda number, frame: got.append(number))
note('up')
while not got: time.sleep(0.05)
time.sleep(0.7)
note('got-%d' % len(got))
sys.exit(75)
"""
    launched = Launched(tmp_path, body)
    pids = launched.pids()
    for _ in range(2 if name != "SIGINT" else 1):
        launched.process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    code, err = launched.end()
    assert code == 75, err
    assert launched.pids("got-1") == pids
    assert err.count(f"dcpo: {name}: passed on to 2 ranks") == 1 and "error" not in err


def test_ranks_that_do_not_end_in_time_after_a_signal_are_killed_and_named(tmp_path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT
    launched = Launched(tmp_path, body, DCPO_GRACE_SECONDS="0.5")
    pids = launched.pids()
    launched.process.send_signal(signal.SIGTERM)
    code, err = launched.end()
    assert code == 128 + 9 and not any(map(is_running, pids))
    assert "rank 0 of 2 was killed because it had not ended 0.5 s after SIGTERM" in err


def test_a_second_interrupt_does_not_wait(tmp_path):
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAIT
    launched = Launched(tmp_path, body)
    pids = launched.pids()
    launched.process.send_signal(signal.SIGINT)
    wait_until(lambda: "SIGINT" in launched.process.stderr.readline())
    launched.process.send_signal(signal.SIGINT)
    code, _ = launched.end()
    assert code == 128 + 9 and not any(map(is_running, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's promise is Linux's")
def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path):
    launched = Launched(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT)
    pids = launched.pids()
    os.kill(pids[1], signal.SIGSTOP)  # not even one that cannot run
    launched.process.kill()
    wait_until(lambda: not any(map(is_running, pids)), 10)


def test_a_grace_that_is_no_number_is_refused(tmp_path):
    code, err = Launched(tmp_path, WAIT, DCPO_GRACE_SECONDS="soon").end()
    assert code == 2 and "DCPO_GRACE_SECONDS='soon'" in err


def test_who_only_starts_ranks_does_not_wait_for_torch():
    code = "import sys, dcpo_megatron.cli.train, dcpo_megatron.launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
