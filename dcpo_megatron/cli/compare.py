"""``dcpo compare PLAN.yaml``: several methods on equal terms, several seeds each, and what that says about the paper's
claims.

    starts (one a seed)      --> runs (one a method and seed, processes side by side)        --> report
    task: prompts and model      dcpo train, resumed from its own checkpoints where killed       HTML, Markdown, CSV

The same command goes on after a stop: what is finished is kept, what is not goes on.

Exit codes: 0 all runs are there and the report is written; 1 some runs failed (the report is of the others); 2 the plan
cannot be used; 75 stopped when asked to: the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from dcpo_megatron.console.quiet import quiet_libraries
from dcpo_megatron.launch.signals import BAD_INPUT, START_AGAIN

# Keys that may differ when a comparison goes on: they change no number of it.
_FREE = ("logging.", "checkpoint.", "training.timeout_seconds", "training.steps")


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dcpo compare", allow_abbrev=False, description="Compares methods on equal terms, over several seeds."
    )
    parser.add_argument("plan", metavar="PLAN.yaml", help="methods, seeds, task and recipe")
    parser.add_argument("--output", help="folder of the comparison, in place of the plan's")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs side by side, in place of the plan's")
    parser.add_argument(
        "--report-only", action="store_true", help="start nothing: the report of the runs that are there"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--make-start", type=int, metavar="SEED", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    from dcpo_megatron.comparison.plan import PlanError, load_plan

    quiet_libraries()
    try:
        if args.parallel is not None and args.parallel < 1:
            raise PlanError(f"--parallel {args.parallel} must be at least 1")
        plan = load_plan(args.plan, args.output)
        if args.make_start is not None:
            return _make_start(plan, args.make_start)
        if args.report_only:
            return _report(plan, {})
        with _alone(plan.folder):
            return _run(plan, Path(args.plan), args.parallel, args.quiet)
    except PlanError as error:
        for line in str(error).splitlines():
            print(f"dcpo: error: {line}", file=sys.stderr)
        return BAD_INPUT


def _run(plan, file: Path, parallel: int | None, quiet: bool) -> int:
    from dcpo_megatron.comparison.jobs import Jobs, StudyJob
    from dcpo_megatron.comparison.runs import is_finished
    from dcpo_megatron.comparison.study_start import is_made
    from dcpo_megatron.files import read_rows

    jobs = []
    for seed in plan.seeds if plan.task is not None else ():
        folder = plan.start_folder(seed)
        if not is_made(folder, plan.task):
            command = [
                "-m",
                "dcpo_megatron.cli",
                "compare",
                str(file),
                "--output",
                plan.output,
                "--make-start",
                str(seed),
            ]
            jobs.append(
                StudyJob(
                    f"start of seed {seed}",
                    command,
                    folder / "log.txt",
                    lambda f=folder, t=plan.task.target: _warmed(f, t),
                )
            )
    # Seed by seed: a comparison that is stopped halfway has all methods of some seeds.
    for seed in plan.seeds:
        for method in plan.methods:
            config, folder = plan.recipe(method, seed), plan.run_folder(method, seed)
            _write_recipe(config, folder)
            if is_finished(folder, config.training.steps):
                continue
            command = ["-m", "dcpo_megatron.cli", "train", "--config", str(folder / "recipe.yaml")]
            if plan.ranks > 1:
                command += ["--ranks", str(plan.ranks)]

            def share(folder: Path = folder, steps: int = config.training.steps) -> float:
                return (read_rows(folder / "metrics.jsonl") or [{"step": 0}])[-1]["step"] / max(1, steps)

            jobs.append(
                StudyJob(f"{method}, seed {seed}", command, folder / "log.txt", share, needs=f"start of seed {seed}")
            )
    total = len(plan.seeds) * len(plan.methods)
    slots = _slots(plan, parallel)
    runs = sum(job.name.partition(", seed ")[1] != "" for job in jobs)
    if not quiet:
        print(
            f"dcpo compare: {total} runs ({len(plan.methods)} methods, {len(plan.seeds)} seeds), {total - runs} of them"
            f" done before; {len(slots)} side by side, {plan.ranks} rank{'s' if plan.ranks > 1 else ''} each",
            file=sys.stderr,
        )
    started = time.monotonic()
    outcome = Jobs(jobs, slots, quiet).run()
    _add_seconds(plan.folder, time.monotonic() - started, len(slots))
    if outcome.left:
        print(f"dcpo compare: stopped, {len(outcome.left)} jobs are left: the same command goes on", file=sys.stderr)
        return START_AGAIN
    return _report(plan, outcome.failed)


def _make_start(plan, seed: int) -> int:
    """One seed's start, in a process of its own."""
    from dcpo_megatron.comparison.study_start import make_start

    folder = plan.start_folder(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def note(step: int, loss: float, accuracy: float) -> None:
        (folder / "progress.json").write_text(json.dumps({"step": step, "loss": loss, "accuracy": accuracy}))

    try:
        made = make_start(folder, plan.task, seed, note)
    except RuntimeError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 1
    print(f"warmed up in {made['warm_up_steps']} steps: right {made['warm_up_accuracy']:.0%} of the time")
    return 0


def _warmed(folder: Path, target: float) -> float:
    with contextlib.suppress(OSError, ValueError):
        accuracy = json.loads((folder / "progress.json").read_text())["accuracy"]
        return 1.0 if accuracy >= target else accuracy / target
    return 0.0


def _write_recipe(config, folder: Path) -> None:
    """``recipe.yaml`` of a run. Raises PlanError where the folder holds a run of another recipe."""
    from dcpo_megatron.checkpoint.resume import changed_keys
    from dcpo_megatron.comparison.plan import PlanError
    from dcpo_megatron.config.loading import to_yaml

    file = folder / "recipe.yaml"
    now = config.model_dump(mode="json")
    if (folder / "metrics.jsonl").is_file() and file.is_file():
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = {k: v for k, v in changed_keys(saved, now).items() if not k.startswith(_FREE)}
        if changed:
            key, (old, new) = next(iter(changed.items()))
            raise PlanError(
                f"{folder} holds a run with {key}={old!r}, the plan now has {new!r}: give another --output, or remove"
                " that folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(config), encoding="utf-8")


def _slots(plan, parallel: int | None) -> list[dict[str, str]]:
    """One environment a place: threads on CPUs, devices on GPUs."""
    import torch

    platform = plan.recipe(next(iter(plan.methods)), plan.seeds[0]).training.platform
    gpus = torch.cuda.device_count() if platform != "cpu" else 0
    wanted = parallel or plan.parallel
    if gpus:
        count = wanted or max(1, gpus // plan.ranks)
        places = [[(place * plan.ranks + rank) % gpus for rank in range(plan.ranks)] for place in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, place))} for place in places]
    cores = len(os.sched_getaffinity(0))
    count = wanted or max(1, cores // plan.ranks)
    return [{"OMP_NUM_THREADS": str(max(1, cores // (count * plan.ranks)))} for _ in range(count)]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the comparison's folder. Raises PlanError where another process does."""
    from dcpo_megatron.comparison.plan import PlanError

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlanError(
                f"{folder} is in use by another `dcpo compare`: wait for it, or give another --output"
            ) from None
        yield


def _add_seconds(folder: Path, seconds: float, parallel: int) -> None:
    """Keeps the wall-clock time of the whole, over all its starts."""
    file = folder / "time.json"
    before = json.loads(file.read_text())["seconds"] if file.is_file() else 0.0
    file.write_text(json.dumps({"seconds": before + seconds, "parallel": parallel}) + "\n")


def _report(plan, failed: dict[str, str]) -> int:
    from dcpo_megatron.comparison.plan import PlanError
    from dcpo_megatron.comparison.report import write_report
    from dcpo_megatron.comparison.runs import read_runs

    runs = read_runs(plan)
    for name, why in failed.items():
        print(f"dcpo compare: {name} failed: {why}", file=sys.stderr)
    if not runs:
        raise PlanError(f"{plan.folder} holds no finished run of the plan: there is nothing to report")
    print(write_report(plan, runs))
    return 1 if failed else 0
