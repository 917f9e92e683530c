"""The training loop. One step, top to bottom:

    prompts -> responses -> rewards -> advantages -> minibatches -> old log-probs -> updates -> new weights to the
    engine -> metrics

:func:`~dcpo_megatron.training.build.build_trainer` makes every part once, and :meth:`Trainer.run` is the loop itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dcpo_megatron.checkpoint.model_copy import UnsavedModelError, holder
from dcpo_megatron.checkpoint.saver import CheckpointSaver
from dcpo_megatron.data import Prompt
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.launch.signals import Stopped
from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.monitor.metrics import rollout_metrics, seconds_metrics, update_metrics
from dcpo_megatron.monitor.mismatch import check_mismatch
from dcpo_megatron.rollout import RolloutEngine
from dcpo_megatron.training.checkpoints import checkpoint, save_copy, step_back
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.held_out import evaluate_held_out
from dcpo_megatron.training.introduction import introduce_run
from dcpo_megatron.training.minibatches import MinibatchMaker
from dcpo_megatron.training.old_logprobs import take_logprobs
from dcpo_megatron.training.parts import Monitors, RunData, RunProgress
from dcpo_megatron.training.rollout_phase import RolloutPhase
from dcpo_megatron.training.summary import write_summary
from dcpo_megatron.weights.transfer import WeightGatherer


@dataclass
class Trainer:
    """Everything one rank holds during a run. ``reference``: the model of the KL term, where there is one."""

    run_: CheckedRun
    folder: Path
    data: RunData
    policy: PolicyModel
    reference: PolicyModel | None
    gatherer: WeightGatherer
    engine: RolloutEngine
    phase: RolloutPhase
    minibatches: MinibatchMaker
    saver: CheckpointSaver
    monitors: Monitors
    progress: RunProgress = field(default_factory=RunProgress)

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> dict | None:
        """Trains up to ``training.steps`` steps; returns (and writes) the summary.

        ``stop_requested`` is asked at each step boundary: where any rank says yes, the run is saved and None is
        returned (start it again to go on). An engine that waits for servers raises Stopped: then the run ends as at the
        boundary before the step.

        Raises:
            UnsavedModelError: the trained model cannot be written at the end. Copies on the way that cannot be written
                are announced.
        """
        config, sinks, watchdog = self.run_.config, self.monitors.sinks, self.monitors.watchdog
        last = config.training.steps
        introduce_run(self)
        if not self.progress.step:
            evaluate_held_out(self, 0)
        for step in range(self.progress.step + 1, last + 1):
            started = time.perf_counter()
            boundary = self.data.sampler.state_dict(), self.phase.pending
            try:
                metrics = self.step(step)
            except Stopped:
                step_back(self, step - 1, *boundary)
                watchdog.close("stopped")
                return None
            self.progress.metrics.append(metrics)
            sinks.step(step, metrics)
            self.progress.seconds += time.perf_counter() - started
            if step == last or (config.evaluation.every and step % config.evaluation.every == 0):
                evaluate_held_out(self, step)
            if config.training.save_every and step % config.training.save_every == 0 and step < last:
                problem = save_copy(self, f"step-{step}")
                if problem is not None:
                    sinks.announce(f"{problem}; training goes on, the next copy tries again")
            if checkpoint(self, step, stop_requested()):
                watchdog.close("stopped")
                return None
        problem = save_copy(self, "model")
        if problem is not None:
            raise UnsavedModelError(
                f"all {last} steps are done, but {problem}; {holder(self.folder / 'checkpoints', last)}"
            )
        summary = write_summary(self)
        watchdog.close("finished")
        return summary

    def step(self, step: int) -> dict[str, float]:
        """One step (numbered from 1). Returns its metrics: the same on every rank, but for seconds and GPU readings."""
        config, monitors = self.run_.config, self.monitors
        span, samples, history = monitors.timeline.span, monitors.samples, self.phase.history
        monitors.watchdog.enter("rollout", step)
        with span("step"):
            rollout = self.phase.run(
                self._next_prompts,
                step,
                prompts_wanted=config.rollout.prompts_per_step,
                max_rounds=config.rollout.max_sampling_rounds,
                progress=self._show_progress,
            )
            table = rollout.table
            # Off-policy by one step: the engine samples the next one's prompts while this one trains.
            if config.rollout.max_staleness and step < config.training.steps:
                self.phase.begin(self._next_prompts(), step + 1)
            if config.publish.colocated:
                self.engine.release_memory()
            parts, minibatches = self.minibatches.make(table, rollout.held)
            with span("old_logprobs"):
                take_logprobs(self, step, minibatches)
                self._check_mismatch(step, minibatches, table)
            updates = []
            for micro_batches in minibatches:
                if micro_batches is minibatches[-1] and samples.due(step):
                    samples.responses(
                        step, table, minibatches, partial(self.policy.logprobs, objective=self.run_.objective),
                        self.run_.objective,
                        lambda token: self.data.tokenizer.decode([token]),
                    )  # fmt: skip
                only = len(minibatches) == 1  # its own forward pass may give old log-probs
                updates.append(self.policy.update(micro_batches, self.run_.objective, self._lr(step), only=only))
                self.progress.updates += 1
            self.phase.take_back_visits(table, parts, updates)
            samples.visits(step, table, history)
            with span("publish"):
                self.engine.load_weights(self.gatherer, version=step)
            metrics = rollout_metrics(table, rollout.totals, rollout.rounds, history)
            metrics |= update_metrics(updates) | monitors.gpu.read()
        seconds = seconds_metrics(monitors.timeline.take())
        monitors.bad_steps.note(step, rollout.held, len(table), updates)
        return metrics | seconds | {"tokens_per_second": rollout.totals["tokens"] / seconds["seconds"]}

    def _next_prompts(self) -> list[Prompt]:
        data = self.data
        return [data.prompts.prompts[i] for i in data.sampler.next(self.run_.config.rollout.prompts_per_step)]

    def _show_progress(self, finished: int, total: int) -> None:
        self.monitors.watchdog.progress()
        self.monitors.sinks.progress(finished, total)

    def _check_mismatch(self, step: int, minibatches, table: ResponseTable) -> None:
        limit = self.run_.config.rollout.max_mismatch
        if limit is not None:
            sequences = [s for micro_batches in minibatches for micro_batch in micro_batches for s in micro_batch]
            here = self.policy.position.owns_loss
            check_mismatch(step, sequences, table.stale, limit=limit, counts_here=here)

    def _lr(self, step: int) -> float:
        optimizer = self.run_.config.optimizer
        return optimizer.lr * (min(1.0, step / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0)

    def close(self, groups: bool = True) -> None:
        """Ends reward processes, sinks and, with ``groups``, the process groups."""
        self.monitors.watchdog.close()
        self.phase.drop_pending()
        self.phase.rewarder.close()
        self.engine.close()
        self.monitors.sinks.close()
        self.monitors.gpu.close()
        if groups:
            platforms.stop()
