"""Kills a training run at random moments and holds what comes of it against an undisturbed run, bit for bit.

    undisturbed:  start ------------------------------------------------> end
    disturbed:    start ----- kill -9   start -- kill -9   start ... ----> end       the same command each time

The run's steps are shared out among the kills. A kill waits for a step of its share, then for a phase (sampling, a checkpoint half-written, weights on their way to the
engine) or a random moment, and takes launcher and ranks at once; where the phase does not show within the share, the moment is the end of the share. Compared are every metric of every step but times, every weight of the model at the end, and every file of the last checkpoint that has no time in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# How a kill chooses its moment.
MOMENTS = ("anywhere", "rollout", "save", "publish", "update")


class Difference(AssertionError):
    """The disturbed run is not the undisturbed one; says where."""


def make_task(folder: Path, *, steps: int, seed: int = 0) -> list[str]:
    """A small model and additions in ``folder``; returns the arguments of ``dcpo train`` but for ``output``."""
    from dcpo_megatron.data import make_arithmetic, write_jsonl
    from dcpo_megatron.training.warm_up import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    save(make_model(len(tokenizer), seed=seed, layers=2, hidden=32), tokenizer, folder / "start")
    write_jsonl(make_arithmetic(16, 0, 9), folder / "train.jsonl")
    return [
        f"model.path={folder / 'start'}", "model.dtype=float32", f"data.files=[{folder / 'train.jsonl'}]", "data.template=plain",
        "data.max_prompt_tokens=8", "rollout.prompts_per_step=8", "rollout.group_size=8", "rollout.max_response_tokens=8",
        "training.minibatch_prompts=4", "training.micro_batch_tokens=128", f"training.steps={steps}", "training.platform=cpu",
        f"training.seed={seed}", "reward.function=dcpo_megatron.cli.resumption:share_of_digits", "optimizer.lr=1e-3",
        "checkpoint.every=2", "logging.tensorboard=false", "logging.report=false",
    ]  # fmt: skip


def share_of_digits(response: str, ground_truth: str) -> float:
    """A reward that a model with random weights can earn in part: the share of its characters that are digits, and one more where it is right."""
    return sum(c.isdigit() for c in response) / max(len(response), 1) + (response == ground_truth)


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


def descendants(pid: int) -> list[int]:
    """Process ids of a process and all below it."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [child.pid for child in process.children(recursive=True)] + [pid]
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank and worker below it, at once."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait(30)


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl knows."""
    from dcpo_megatron.training.metrics_file import read_rows

    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


def wait_for(
    moment: str, run: Path, process: subprocess.Popen, share: range, chance: random.Random, deadline: float
) -> str | None:
    """Waits until the run has done a step of ``share`` and is at ``moment``. Returns what it met, None where the run ended before."""
    until = time.monotonic() + deadline

    def running() -> bool:
        return process.poll() is None and time.monotonic() < until

    while running() and (steps_done(run) < share.start or not _resumed(run)):
        time.sleep(0.01)
    started, first = time.monotonic(), steps_done(run)
    wait = chance.uniform(0, 1.5)
    while running() and steps_done(run) < share.stop - 1:
        if moment == "anywhere" and time.monotonic() - started > wait:
            return moment
        # A step of this start must have been done: the files of the one before still tell of its last phase.
        if steps_done(run) > first:
            if moment == "save" and list((run / "checkpoints").glob("*.incomplete")):
                time.sleep(chance.uniform(0, 0.02))
                return moment
            if moment in MOMENTS[1:] and _phase(run) == moment:
                return moment
        time.sleep(0.0001)  # publishing to an engine in the same process takes little more than a millisecond
    return "anywhere" if running() else None


def _resumed(run: Path) -> bool:
    # A kill before the first checkpoint of a run proves little; one after it proves that it is found.
    return any((run / "checkpoints").glob("step-*"))


def _phase(run: Path) -> str | None:
    try:
        return json.loads((run / "health" / "rank-00000.json").read_text())["phase"]
    except (OSError, ValueError, KeyError):
        return None


# -- comparing ----------------------------------------------------------------------------------------------------------------------------------


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
    return f"{values} metrics of {len(wanted)} rows and {count} numbers of model, optimizer and history are equal bit for bit"


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


# -- the command --------------------------------------------------------------------------------------------------------------------------------


def verify(folder: Path, *, kills: int, ranks: int, steps: int, seed: int, say=print, deadline: float = 300.0) -> None:
    """Runs the whole comparison in ``folder``. Raises :class:`Difference`, or RuntimeError where a run fails by itself."""
    chance = random.Random(seed)
    task = make_task(folder, steps=steps)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    process = start([*task, f"output={undisturbed}"], ranks, folder / "undisturbed.log")
    if process.wait(deadline * 2) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{(folder / 'undisturbed.log').read_text()[-2000:]}")
    say(f"undisturbed: {steps} steps on {ranks} ranks")
    log, done = folder / "disturbed.log", 0
    arguments = [*task, f"output={disturbed}"]
    # The first steps end in no checkpoint, the last ones leave nothing to resume for.
    edges = [2 + round(number * (steps - 4) / kills) for number in range(kills + 1)]
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        process = start(arguments, ranks, log)
        try:
            met = wait_for(moment, disturbed, process, range(edges[number], edges[number + 1]), chance, deadline)
        finally:
            phase = _phase(disturbed)
            kill_all(process)
        if met:
            done += 1
        say(
            f"kill {number + 1} ({moment}): {f'met {met} in {phase}' if met else 'the run had ended'} after step {steps_done(disturbed)}"
        )
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run failed by itself ({process.returncode}):\n{log.read_text()[-2000:]}")
    process = start(arguments, ranks, log)
    if process.wait(deadline * 2) != 0:
        raise RuntimeError(f"the last start failed:\n{log.read_text()[-2000:]}")
    say(compare(undisturbed, disturbed))
    if done < kills:
        raise RuntimeError(f"only {done} of {kills} kills met a running run: give more --steps")


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code: 0 equal, 1 not."""
    parser = argparse.ArgumentParser(
        prog="tools/verify_resume.py",
        description="Kills a small run with SIGKILL at random moments and compares it with an undisturbed one.",
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None, help="of the run (default: enough for the kills)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="keep everything there (default: a temporary folder)")
    args = parser.parse_args(argv)
    steps = args.steps if args.steps is not None else 10 + 3 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            verify(
                folder,
                kills=args.kills,
                ranks=args.ranks,
                steps=steps,
                seed=args.seed,
                say=lambda line: print(line, flush=True),
            )
        except (Difference, RuntimeError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    return 0
