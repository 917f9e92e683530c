"""A run's checkpoints: begun and completed at step boundaries, and taken over when it goes on.

    checkpoint(trainer, step, stop)     completes the one under way, begins one where it is time
    resume(trainer, path, state)        everything of a checkpoint but weights and optimizer
    step_back(trainer, step, ...)       the run ends as after a step whose follower had begun
    save_copy(trainer, name)            the weights alone, as a Hugging Face folder

How the files are written and read is ``checkpoint/``'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcpo_megatron.advantages.sas_file import load_history, save_history_state
from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.checkpoint.model_copy import write_copy
from dcpo_megatron.checkpoint.resume import (
    HISTORY_FILE,
    RUN_FILE,
    RunState,
    data_fingerprint,
    layout_note,
    versions,
)
from dcpo_megatron.checkpoint.saver import SaveResult
from dcpo_megatron.checkpoint.snapshot import take_snapshot
from dcpo_megatron.mcore.random_state import random_state, set_random_state
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.pending import PendingBatch, read_pending

if TYPE_CHECKING:
    from dcpo_megatron.training.loop import Trainer


def resume(trainer: Trainer, path: Path, state: RunState) -> None:
    """Takes over everything of the checkpoint ``path`` but weights and optimizer, which are in place already."""
    run_, sinks, progress = trainer.run_, trainer.monitors.sinks, trainer.progress
    progress.step, progress.updates, progress.seconds = state.step, state.updates_done, state.train_seconds
    progress.saved_step = state.step
    progress.evaluations = {int(step): result for step, result in state.evaluations.items()}
    progress.metrics = [row for row in sinks.kept if "seconds" in row]
    trainer.data.sampler.load_state_dict(state.sampler)
    if trainer.phase.history is not None:
        load_history(path / HISTORY_FILE, trainer.phase.history)
    note = layout_note(state, run_.config, _layout(run_))
    random_file = path / f"random-{dist.get_rank():05d}.json"
    if note is None and random_file.is_file():
        set_random_state(json.loads(random_file.read_text(encoding="utf-8")), run_.platform)
    sinks.announce(f"resumed from {path}: {state.step} of {run_.config.training.steps} steps are done")
    if note is not None:
        sinks.announce(note)
    pending = read_pending(path, trainer.data.prompts.prompts)
    if pending is not None:
        step, prompts, finished = pending
        sinks.announce(f"{len(finished)} responses of step {step} were sampled before: they are kept")
        trainer.phase.begin(prompts, step, finished)


def checkpoint(trainer: Trainer, step: int, stop: bool) -> bool:
    """At a step boundary: completes the checkpoint under way, begins one where it is time. Returns whether the run must
    stop here. Collective; ``stop``: whether this rank was asked to."""
    config, saver, monitors = trainer.run_.config, trainer.saver, trainer.monitors
    settings, last = config.checkpoint, step == config.training.steps
    monitors.watchdog.enter("save", step, settings.timeout_seconds + config.training.timeout_seconds)
    reports, stop = saver.poll(stop)
    due = settings.every and (step % settings.every == 0 or last)
    if due or (stop and settings.every):
        clock = time.perf_counter()
        reports += saver.finish()
        beside = settings.asynchronous and not (stop or last)
        snapshot = take_snapshot(trainer.policy, saver.memory)
        saver.start(step, snapshot, _extras(trainer, step), beside_training=beside)
        if not beside:
            reports += saver.finish()
        waited = time.perf_counter() - clock
        monitors.sinks.announce(f"checkpoint of step {step}: training waited {waited:.2f} s")
    _announce(trainer, reports)
    return stop and not last


def step_back(trainer: Trainer, step: int, sampler: dict, pending: PendingBatch | None) -> None:
    """Ends the run as after ``step`` steps: the next one had begun and nothing of it was trained. ``sampler``,
    ``pending``: as they were."""
    trainer.data.sampler.load_state_dict(sampler)
    trainer.phase.pending = trainer.phase.pending or pending
    trainer.monitors.sinks.announce(
        f"asked to stop while it waits for rollout servers: step {step + 1} begins anew when the run goes on"
    )
    _announce(trainer, trainer.saver.finish())
    if trainer.progress.saved_step < step:
        checkpoint(trainer, step, stop=True)


def save_copy(trainer: Trainer, name: str) -> str | None:
    """The current weights as a Hugging Face folder ``output/name``; collective. A sentence on every rank where it could
    not be written."""
    run_, monitors = trainer.run_, trainer.monitors
    monitors.watchdog.enter("save", timeout_seconds=run_.config.checkpoint.timeout_seconds)
    return write_copy(trainer.gatherer.on_first(), trainer.folder / name, run_.hf_folder, monitors.sinks.warn)


def _announce(trainer: Trainer, reports: list[SaveResult]) -> None:
    sinks = trainer.monitors.sinks
    for report in reports:
        if report.problem is None:
            trainer.progress.saved_step = report.step
            sinks.announce(f"checkpoint of step {report.step} is complete after {report.seconds:.2f} s")
        else:
            at_the_end = report.step == trainer.run_.config.training.steps
            then = "it was the last one" if at_the_end else "training goes on, the next one tries again"
            sinks.announce(f"checkpoint of step {report.step} could not be written: {report.problem}; {then}")
        for warning in report.warnings:
            sinks.warn(warning)


def _extras(trainer: Trainer, step: int) -> Callable[[Path], None]:
    """What goes into a checkpoint beside weights and optimizer: copies are made now, and written by the function that
    is returned."""
    rank, writer = dist.get_rank(), dist.get_rank() == 0
    run_, progress, phase = trainer.run_, trainer.progress, trainer.phase
    state = RunState(
        step=step,
        updates_done=progress.updates,
        sampler=trainer.data.sampler.state_dict(),
        evaluations={str(at): result for at, result in progress.evaluations.items()},
        train_seconds=progress.seconds,
        config=run_.config.model_dump(mode="json"),
        data=data_fingerprint(trainer.data.prompts),
        layout=_layout(run_),
        versions=versions(),
    ).to_json()
    history = phase.history.state_dict() if writer and phase.history is not None else None
    numbers = json.dumps(random_state(run_.platform))
    pending = phase.pending
    sampled = pending.finished() if pending is not None else []

    def write(folder: Path) -> None:
        if pending is not None:
            pending.write(sampled, folder, rank)
        folders.write_text(folder / f"random-{rank:05d}.json", numbers)
        if writer:
            folders.write_text(folder / RUN_FILE, state)
            if history is not None:
                save_history_state(history, folder / HISTORY_FILE)

    return write


def _layout(run_: CheckedRun) -> dict:
    return {**asdict(run_.layout), "ranks": dist.get_world_size(), "platform": run_.platform.name}
