"""Kills a training run at random moments and holds what comes of it against an undisturbed run, bit for bit.

    undisturbed:  start ------------------------------------------------> end
    disturbed:    start ----- kill -9   start -- kill -9   start ... ----> end       the same command each time

What is left of the run's steps is shared out among the kills that are left. A kill waits for a step of its start, then
for a phase (sampling, a checkpoint half-written, weights on their way to the engine) or a random moment, and takes
launcher and ranks at once; where the phase does not show within the share, the moment is the end of the share. Where a
run comes to its end before its kills, on a machine that is busy with other work, another disturbed run has the rest of
them.

Compared are every metric of every step but times, every weight of the model at the end, and every file of the last
checkpoint that has no time in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from dcpo_megatron.checkpoint.folder import INCOMPLETE
from dcpo_megatron.console.quiet import quiet_libraries
from dcpo_megatron.files import read_rows

ROOT = Path(__file__).resolve().parents[2]
# How a kill chooses its moment. "start" is before the first step of a start, also in the middle of loading a
# checkpoint.
MOMENTS = ("anywhere", "rollout", "save", "publish", "update", "start")
# Steps of a run for each kill: most phases are so short that they show in one step of ten.
STEPS_A_KILL = 15
# Disturbed runs, where the first does not last for all kills.
ATTEMPTS = 5


class Difference(AssertionError):
    """The disturbed run is not the undisturbed one; says where."""


def make_task(folder: Path, *, steps: int, seed: int = 0) -> list[str]:
    """A small model and additions in ``folder``; returns the arguments of ``dcpo train`` but for ``output``."""
    from dcpo_megatron.files import write_jsonl
    from dcpo_megatron.toys.arithmetic import make_arithmetic
    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    save(make_model(len(tokenizer), seed=seed, layers=2, hidden=32), tokenizer, folder / "start")
    write_jsonl(make_arithmetic(16, 0, 9), folder / "train.jsonl")
    return [
        f"model.path={folder / 'start'}", "model.dtype=float32", f"data.files=[{folder / 'train.jsonl'}]",
        "data.template=plain",
        "data.max_prompt_tokens=8", "rollout.prompts_per_step=8", "rollout.group_size=8",
        "rollout.max_response_tokens=8",
        "training.minibatch_prompts=4", "training.micro_batch_tokens=128", f"training.steps={steps}",
        "training.platform=cpu",
        f"training.seed={seed}", "reward.function=dcpo_megatron.toys.arithmetic:share_of_digits", "optimizer.lr=1e-3",
        "checkpoint.every=2", "logging.tensorboard=false", "logging.report=false",
    ]  # fmt: skip


def start(arguments: list[str], ranks: int, log: Path) -> subprocess.Popen:
    """Starts the run in a session of its own, so that all of it can be killed at once."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "dcpo_megatron.cli", "train", "--ranks", str(ranks), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank and worker below it, at once; returns when they are gone."""
    import psutil

    try:
        launcher = psutil.Process(process.pid)
        below = launcher.children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    # The launcher first: it must not see a rank die and end by itself.
    process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(30)
    psutil.wait_procs(below, timeout=30)


def wait_for_the_end(process: subprocess.Popen, deadline: float, log: Path, what: str) -> None:
    """Raises RuntimeError, with the end of ``log``, where ``what`` fails or takes longer than ``deadline`` seconds;
    nothing of it is left then."""
    try:
        code = process.wait(deadline)
        problem = f"failed ({code})" if code else None
    except subprocess.TimeoutExpired:
        problem = f"did not end within {deadline:.0f} s"
    finally:
        kill_all(process)
    if problem:
        raise RuntimeError(f"{what} {problem}:\n{log.read_text()[-2000:]}")


class Watch:
    """What the files of a run tell, read again only where they have changed."""

    def __init__(self, run: Path):
        self._rows, self._health = run / "metrics.jsonl", run / "health" / "rank-00000.json"
        self._checkpoints = run / "checkpoints"
        self._seen: dict[Path, tuple] = {}
        self._steps, self._phase = 0, None

    def _changed(self, file: Path) -> bool:
        try:
            found = file.stat()
        except OSError:
            return False
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        changed = self._seen.get(file) != mark
        self._seen[file] = mark
        return changed

    @property
    def steps(self) -> int:
        """The last step that metrics.jsonl knows."""
        if self._changed(self._rows):
            self._steps = max((row["step"] for row in read_rows(self._rows)), default=0)
        return self._steps

    @property
    def phase(self) -> str | None:
        """Where rank 0 is."""
        if self._changed(self._health):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._phase = json.loads(self._health.read_text())["phase"]
        return self._phase

    @property
    def saving(self) -> bool:
        return any(self._checkpoints.glob("*" + INCOMPLETE))


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl knows."""
    return Watch(run).steps


def wait_for(
    moment: str, watch: Watch, process: subprocess.Popen, last: int, chance: random.Random, deadline: float
) -> str:
    """Waits until the run is at ``moment``, or has done step ``last``, or has ended. Returns what it met."""
    until = time.monotonic() + deadline
    first = watch.steps
    wait = time.monotonic() + chance.uniform(1, 8)
    while watch.steps == first:
        if process.poll() is not None or time.monotonic() > until or (moment == "start" and time.monotonic() > wait):
            return "start"
        time.sleep(0.005)
    if moment == "start":
        return moment
    wait = time.monotonic() + chance.uniform(0, 1.5)
    while process.poll() is None and time.monotonic() < until and watch.steps < last:
        if moment == "save" and watch.saving:
            time.sleep(chance.uniform(0, 0.02))
            return moment
        if moment == watch.phase or (moment == "anywhere" and time.monotonic() > wait):
            return moment
        time.sleep(0.0002)  # publishing to an engine in the same process takes little more than a millisecond
    return "anywhere"


# -- comparing -------------------------------------------------------------------------------------


def _rows(run: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_second", "gpu")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def compare(undisturbed: Path, disturbed: Path) -> str:
    """Holds two finished runs against each other; returns a sentence with what was compared.

    Raises:
        Difference: the first thing that is not equal.
    """
    wanted, found = _rows(undisturbed), _rows(disturbed)
    if [row["step"] for row in wanted] != [row["step"] for row in found]:
        raise Difference(f"steps {[row['step'] for row in found]} instead of {[row['step'] for row in wanted]}")
    for a, b in zip(wanted, found):
        for name in a.keys() | b.keys():
            if a.get(name) != b.get(name):
                raise Difference(f"{name} of step {a['step']}: {b.get(name)} instead of {a.get(name)}")
    count = 0
    for folder, names in (("model", ["model.safetensors"]), *_last_checkpoints(undisturbed, disturbed)):
        for name in names:
            first, second = load_file(undisturbed / folder / name), load_file(disturbed / folder / name)
            for key in first.keys() | second.keys():
                if key not in first or key not in second or not torch.equal(first[key], second[key]):
                    raise Difference(f"{key} of {folder}/{name} differs")
                count += first[key].numel()
    count += _compare_checkpoints(undisturbed, disturbed)
    values = sum(len(row) - 1 for row in wanted)
    return (
        f"{values} metrics of {len(wanted)} rows and {count} numbers of model, optimizer and history are equal bit"
        " for bit"
    )


def _last_checkpoints(undisturbed: Path, disturbed: Path):
    names = [(run / "checkpoints" / "latest").read_text().strip() for run in (undisturbed, disturbed)]
    if names[0] != names[1]:
        raise Difference(f"the last checkpoint is {names[1]} instead of {names[0]}")
    yield f"checkpoints/{names[0]}", ["history.safetensors"]


def _compare_checkpoints(undisturbed: Path, disturbed: Path) -> int:
    from dcpo_megatron.weights.torch_dist import TorchDistFolder

    name = (undisturbed / "checkpoints" / "latest").read_text().strip()
    first, second = (TorchDistFolder(run / "checkpoints" / name) for run in (undisturbed, disturbed))
    if first.tensors.keys() != second.tensors.keys():
        raise Difference("the checkpoints hold different tensors")
    count = 0
    for key in first.tensors:
        if not torch.equal(first.read(key), second.read(key)):
            raise Difference(f"{key} of the last checkpoint differs")
        count += first.read(key).numel()
    states = [json.loads((run / "checkpoints" / name / "run.json").read_text()) for run in (undisturbed, disturbed)]
    for key in ("step", "updates_done", "sampler", "data"):
        if states[0][key] != states[1][key]:
            raise Difference(f"{key} of the last checkpoint: {states[1][key]} instead of {states[0][key]}")
    return count


# -- the command -----------------------------------------------------------------------------------


def verify(folder: Path, *, kills: int, ranks: int, steps: int, seed: int, say=print, deadline: float = 300.0) -> None:
    """Runs the whole comparison in ``folder``. Raises :class:`Difference`, or RuntimeError where a run fails by
    itself."""
    chance = random.Random(seed)
    task = make_task(folder, steps=steps)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    log = folder / "undisturbed.log"
    wait_for_the_end(start([*task, f"output={undisturbed}"], ranks, log), deadline * 2, log, "the undisturbed run")
    say(f"undisturbed: {steps} steps on {ranks} ranks")
    met = 0
    for attempt in range(ATTEMPTS):
        run = disturbed if not attempt else folder / f"disturbed-{attempt + 1}"
        met += _disturb([*task, f"output={run}"], run, ranks, steps, met, kills, chance, say, deadline)
        equal = compare(undisturbed, run)
        if met == kills:
            say(equal)
            return
        say(f"the run came to its end before {kills - met} of its kills: another one has them")
    raise RuntimeError(f"only {met} of {kills} kills met a running run: give more --steps")


def _disturb(arguments, run: Path, ranks: int, steps: int, met: int, kills: int, chance, say, deadline: float) -> int:
    """One disturbed run from its first start to its end, with the kills from ``met`` to ``kills``; returns how many met
    it running."""
    before, log, watch = met, run.with_suffix(".log"), Watch(run)
    while met < kills and watch.steps < steps:
        moment = MOMENTS[met % len(MOMENTS)]
        # The last steps leave nothing to resume for.
        last = watch.steps + max(2, (steps - 4 - watch.steps) // (kills - met))
        process = start(arguments, ranks, log)
        try:
            found = wait_for(moment, watch, process, last, chance, deadline)
        finally:
            kill_all(process)
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run failed by itself ({process.returncode}):\n{log.read_text()[-2000:]}")
        if process.returncode == 0:
            break
        met += 1
        say(f"kill {met} ({moment}): met {found} in {watch.phase} after step {watch.steps}")
    wait_for_the_end(start(arguments, ranks, log), deadline * 2, log, "the last start")
    return met - before


def main(argv: list[str] | None = None, cut_links: Callable[..., None] | None = None) -> int:
    """Runs the comparison; returns the exit code: 0 equal, 1 not.

    ``cut_links``: what a checkout has beside, for ``--hosts`` and ``--cuts``: ``verify`` of ``tools/link_cuts.py``.
    """
    parser = argparse.ArgumentParser(
        prog="tools/verify_resume.py",
        description="Kills a small run with SIGKILL at random moments and compares it with an undisturbed one.",
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    if cut_links is not None:
        parser.add_argument(
            "--hosts", type=int, default=2, help="with --cuts: hosts of network namespaces, a rank each"
        )
        parser.add_argument(
            "--cuts",
            type=int,
            default=None,
            help="cut links of --hosts so often, for 5 s up to for ever, and kill nothing",
        )
    parser.add_argument("--steps", type=int, default=None, help="of the run (default: enough for the kills, or cuts)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="keep everything there (default: a temporary folder)")
    args = parser.parse_args(argv)
    quiet_libraries()
    cuts = getattr(args, "cuts", None)
    steps = args.steps if args.steps is not None else 10 + STEPS_A_KILL * (args.kills if cuts is None else cuts)
    # Hosts have their folders under /tmp, whatever TMPDIR says, and sockets there need short names.
    with tempfile.TemporaryDirectory(dir=None if cuts is None else "/tmp") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"steps": steps, "seed": args.seed, "say": lambda line: print(line, flush=True)}
        try:
            if cuts is not None:
                cut_links(folder.resolve(), hosts=args.hosts, cuts=cuts, **options)
            else:
                verify(folder, kills=args.kills, ranks=args.ranks, **options)
        except (Difference, RuntimeError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    return 0
