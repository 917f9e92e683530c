"""The training loop. One step, top to bottom:

    prompts -> responses -> rewards -> advantages -> minibatches -> old log-probs -> updates -> new weights to the
    engine -> metrics

:func:`~dcpo_megatron.training.build.build_trainer` makes every part once, and :meth:`Trainer.run` is the loop itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist
from rich.markup import escape

from dcpo_megatron.advantages.sas_file import load_history, save_history_state
from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.checkpoint.model_copy import UnsavedModelError, holder, write_copy
from dcpo_megatron.checkpoint.resume import (
    HISTORY_FILE,
    RUN_FILE,
    Found,
    RunState,
    data_fingerprint,
    layout_note,
    versions,
)
from dcpo_megatron.checkpoint.saver import CheckpointSaver, SaveReport
from dcpo_megatron.checkpoint.snapshot import take_snapshot
from dcpo_megatron.data import PromptSampler, PromptSet, Response
from dcpo_megatron.data.packing import PackingOptions
from dcpo_megatron.evaluation.during_training import evaluate
from dcpo_megatron.launch.signals import Stopped
from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.mcore.random_state import random_state, set_random_state
from dcpo_megatron.mcore.step import PolicyModel, UpdateResult
from dcpo_megatron.monitor.bad_steps import BadSteps
from dcpo_megatron.monitor.curves import draw_report
from dcpo_megatron.monitor.gpu import GpuMonitor
from dcpo_megatron.monitor.metrics import seconds_metrics, update_metrics
from dcpo_megatron.monitor.mismatch import check_mismatch, mean_of, stale_tokens
from dcpo_megatron.monitor.samples import SampleLog
from dcpo_megatron.monitor.sinks import Sinks
from dcpo_megatron.monitor.watchdog import Watchdog, WatchedTimeline
from dcpo_megatron.rollout import RolloutEngine
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.introduction import introduce
from dcpo_megatron.training.minibatches import plan_minibatch, split_minibatches
from dcpo_megatron.training.pending import PendingBatch, read_pending
from dcpo_megatron.training.rollout_phase import RolloutPhase, RolloutResult
from dcpo_megatron.weights.transfer import WeightGatherer


@dataclass
class Trainer:
    """Everything one rank holds during a run."""

    run_: CheckedRun
    folder: Path
    tokenizer: object
    prompts: PromptSet
    held_out: PromptSet | None
    sampler: PromptSampler
    policy: PolicyModel
    reference: PolicyModel | None
    gatherer: WeightGatherer
    engine: RolloutEngine
    phase: RolloutPhase
    packing: PackingOptions
    sinks: Sinks
    gpu: GpuMonitor
    saver: CheckpointSaver
    watchdog: Watchdog
    timeline: WatchedTimeline
    bad_steps: BadSteps
    samples: SampleLog
    start_step: int = 0
    updates_done: int = 0
    train_seconds: float = 0.0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    history_of_metrics: list[dict[str, float]] = field(default_factory=list)
    saved_step: int = 0  # of the last complete checkpoint

    def resume(self, found: Found) -> None:
        """Takes over everything of a checkpoint but weights and optimizer, which are in place already."""
        state = found.state
        self.start_step, self.updates_done, self.train_seconds = state.step, state.updates_done, state.train_seconds
        self.saved_step = state.step
        self.evaluations = {int(step): result for step, result in state.evaluations.items()}
        self.history_of_metrics = [row for row in self.sinks.kept if "seconds" in row]
        self.sampler.load_state_dict(state.sampler)
        if self.phase.history is not None:
            load_history(found.path / HISTORY_FILE, self.phase.history)
        note = layout_note(state, self.run_.config, self._layout())
        random_file = found.path / f"random-{dist.get_rank():05d}.json"
        if note is None and random_file.is_file():
            set_random_state(json.loads(random_file.read_text(encoding="utf-8")), self.run_.platform)
        self.sinks.announce(
            f"resumed from {found.path}: {state.step} of {self.run_.config.training.steps} steps are done"
        )
        if note is not None:
            self.sinks.announce(note)
        pending = read_pending(found.path, self.prompts.prompts)
        if pending is not None:
            step, prompts, finished = pending
            self.sinks.announce(f"{len(finished)} responses of step {step} were sampled before: they are kept")
            self.phase.begin(prompts, step, finished)

    def _layout(self) -> dict:
        return {**asdict(self.run_.layout), "ranks": dist.get_world_size(), "platform": self.run_.platform.name}

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> dict | None:
        """Trains up to ``training.steps`` steps; returns (and writes) the summary.

        ``stop_requested`` is asked at each step boundary: where any rank says yes, the run is saved and None is
        returned (start it again to go on). An engine that waits for servers raises Stopped: then the run ends as at the
        boundary before the step.

        Raises:
            UnsavedModelError: the trained model cannot be written at the end. Copies on the way that cannot be written
                are announced.
        """
        config = self.run_.config
        last = config.training.steps
        self._introduce()
        if not self.start_step:
            self._evaluate(0)
        for step in range(self.start_step + 1, last + 1):
            started = time.perf_counter()
            boundary = self.sampler.state_dict(), self.phase.pending
            try:
                metrics = self.step(step)
            except Stopped:
                self._step_back(step - 1, *boundary)
                return None
            self.history_of_metrics.append(metrics)
            self.sinks.step(step, metrics)
            self.train_seconds += time.perf_counter() - started
            if step == last or (config.evaluation.every and step % config.evaluation.every == 0):
                self._evaluate(step)
            if config.training.save_every and step % config.training.save_every == 0 and step < last:
                problem = self._save(f"step-{step}")
                if problem is not None:
                    self.sinks.announce(f"{problem}; training goes on, the next copy tries again")
            if self._checkpoint(step, stop_requested()):
                self.watchdog.close("stopped")
                return None
        problem = self._save("model")
        if problem is not None:
            raise UnsavedModelError(
                f"all {last} steps are done, but {problem}; {holder(self.folder / 'checkpoints', last)}"
            )
        summary = self._finish(self.train_seconds)
        self.watchdog.close("finished")
        return summary

    def _step_back(self, step: int, sampler: dict, pending: PendingBatch | None) -> None:
        """Ends the run as after ``step`` steps: the next one had begun and nothing of it was trained. ``sampler``,
        ``pending``: as they were."""
        self.sampler.load_state_dict(sampler)
        self.phase.pending = self.phase.pending or pending
        self.sinks.announce(
            f"asked to stop while it waits for rollout servers: step {step + 1} begins anew when the run goes on"
        )
        self._announce(self.saver.finish())
        if self.saved_step < step:
            self._checkpoint(step, stop=True)
        self.watchdog.close("stopped")

    def _checkpoint(self, step: int, stop: bool) -> bool:
        """At a step boundary: completes the checkpoint under way, begins one where it is time. Returns whether the run
        must stop here."""
        settings, last = self.run_.config.checkpoint, step == self.run_.config.training.steps
        self.watchdog.enter("save", step, settings.timeout_seconds + self.run_.config.training.timeout_seconds)
        reports, stop = self.saver.poll(stop)
        due = settings.every and (step % settings.every == 0 or last)
        if due or (stop and settings.every):
            clock = time.perf_counter()
            reports += self.saver.finish()
            beside = settings.asynchronous and not (stop or last)
            snapshot = take_snapshot(self.policy, self.saver.memory)
            self.saver.start(step, snapshot, self._extras(step), beside_training=beside)
            if not beside:
                reports += self.saver.finish()
            waited = time.perf_counter() - clock
            self.sinks.announce(f"checkpoint of step {step}: training waited {waited:.2f} s")
        self._announce(reports)
        return stop and not last

    def _announce(self, reports: list[SaveReport]) -> None:
        for report in reports:
            if report.problem is None:
                self.saved_step = report.step
                self.sinks.announce(f"checkpoint of step {report.step} is complete after {report.seconds:.2f} s")
            else:
                at_the_end = report.step == self.run_.config.training.steps
                then = "it was the last one" if at_the_end else "training goes on, the next one tries again"
                self.sinks.announce(f"checkpoint of step {report.step} could not be written: {report.problem}; {then}")
            for warning in report.warnings:
                self.sinks.warn(warning)

    def _extras(self, step: int) -> Callable[[Path], None]:
        """What goes into a checkpoint beside weights and optimizer: copies are made now, and written by the function
        that is returned."""
        rank, writer = dist.get_rank(), dist.get_rank() == 0
        state = RunState(
            step=step,
            updates_done=self.updates_done,
            sampler=self.sampler.state_dict(),
            evaluations={str(at): result for at, result in self.evaluations.items()},
            train_seconds=self.train_seconds,
            config=self.run_.config.model_dump(mode="json"),
            data=data_fingerprint(self.prompts),
            layout=self._layout(),
            versions=versions(),
        ).to_json()
        history = self.phase.history.state_dict() if writer and self.phase.history is not None else None
        numbers = json.dumps(random_state(self.run_.platform))
        pending = self.phase.pending
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

    def step(self, step: int) -> dict[str, float]:
        """One step (numbered from 1). Returns its metrics: the same on every rank, but for seconds and GPU readings."""
        config, span = self.run_.config, self.timeline.span
        self.watchdog.enter("rollout", step)
        with span("step"):
            rollout = self.phase.run(
                lambda: [self.prompts.prompts[i] for i in self.sampler.next(config.rollout.prompts_per_step)],
                step,
                prompts_wanted=config.rollout.prompts_per_step,
                max_rounds=config.rollout.max_sampling_rounds,
                progress=self._progress,
            )
            sampled_under = self.engine.version
            self._begin_next(step + 1)
            if config.publish.colocated:
                self.engine.release_memory()
            parts = split_minibatches(rollout.responses, config.training.minibatch_prompts)
            with span("packing"):
                minibatches = [self._plan(rollout.responses, indices) for indices in parts]
            with span("old_logprobs"):
                self._fill_old_logprobs(minibatches)
                self._check_mismatch(step, minibatches, rollout.responses)
            updates = []
            for micro_batches in minibatches:
                if micro_batches is minibatches[-1] and self.samples.due(step):
                    self.samples.responses(
                        step,
                        rollout.responses,
                        minibatches,
                        self.policy.logprobs,
                        self.run_.objective,
                        lambda token: self.tokenizer.decode([token]),
                    )
                updates.append(self.policy.update(micro_batches, self.run_.objective, self._lr(step)))
                self.updates_done += 1
            self._take_back_visits(rollout.responses, parts, updates)
            self.samples.visits(step, rollout.responses, self.phase.history)
            with span("publish"):
                self.engine.load_weights(self.gatherer, version=step)
            metrics = self._rollout_metrics(rollout, sampled_under) | update_metrics(updates) | self.gpu.read()
        seconds = seconds_metrics(self.timeline.take())
        self.bad_steps.note(step, rollout.responses, updates)
        return metrics | seconds | {"tokens_per_second": rollout.totals["tokens"] / seconds["seconds"]}

    def _take_back_visits(self, responses: list[Response], parts: list[list[int]], updates: list[UpdateResult]) -> None:
        """A visit counts where it reached an update: those of an update that was left out are taken back. The same on
        every rank."""
        if self.phase.history is None:
            return
        for indices, update in zip(parts, updates, strict=True):
            if not update.stepped:
                self.phase.history.take_back({responses[index].prompt_id for index in indices})

    def _progress(self, finished: int, total: int) -> None:
        self.watchdog.progress()
        self.sinks.progress(finished, total)

    def _plan(self, responses: list[Response], indices: list[int]):
        position = self.policy.position
        return plan_minibatch(
            responses,
            indices,
            self.run_.objective,
            self.packing,
            max_response_tokens=self.run_.config.rollout.max_response_tokens,
            data_rank=position.data_rank,
            data_size=position.data_size,
            # The interleaved schedule wants a multiple of the pipeline size.
            multiple_of=position.pipeline_size if self.run_.layout.interleaved else 1,
        )

    def _fill_old_logprobs(self, minibatches) -> None:
        """Old (and reference) log-probs of the whole rollout batch, before its first update, in the very micro-batches
        that the updates will use."""
        everything = [micro_batch for micro_batches in minibatches for micro_batch in micro_batches]
        if not everything:
            return
        for name, model in (("old_logprobs", self.policy), ("reference_logprobs", self.reference)):
            if model is None:
                continue
            found = model.logprobs(everything)
            for micro_batch in everything:
                for sequence in micro_batch:
                    setattr(sequence, name, found.get(sequence.number))

    def _lr(self, step: int) -> float:
        warmup = self.run_.config.optimizer.warmup_steps
        share = min(1.0, step / warmup) if warmup else 1.0
        return self.run_.config.optimizer.lr * share

    def _begin_next(self, step: int) -> None:
        """Off-policy by one step: the prompts of the next step go to the engine, which samples while this step
        trains."""
        rollout = self.run_.config.rollout
        if rollout.max_staleness and step <= self.run_.config.training.steps:
            self.phase.begin([self.prompts.prompts[i] for i in self.sampler.next(rollout.prompts_per_step)], step)

    def _check_mismatch(self, step: int, minibatches, responses: list[Response]) -> None:
        limit = self.run_.config.rollout.max_mismatch
        if limit is None:
            return
        check_mismatch(
            step,
            [s for micro_batches in minibatches for micro_batch in micro_batches for s in micro_batch],
            responses,
            version=self.engine.version,
            limit=limit,
            counts_here=self.policy.position.owns_loss,
        )

    def _rollout_metrics(self, rollout: RolloutResult, version: int) -> dict[str, float]:
        totals, responses = rollout.totals, rollout.responses
        generated = totals["generated"]
        metrics = {
            "reward": totals["reward"] / generated,
            "accuracy": totals["correct"] / generated,
            "response_length": totals["tokens"] / generated,
            "truncated": totals["truncated"] / generated,
            "reward_failures": totals["reward_failures"] / generated,
            "responses_generated": generated,
            "responses_trained": float(len(responses)),
            "sampling_rounds": float(rollout.rounds),
            "response_utilization_ratio": sum(r.advantage != 0 for r in responses) / generated,
        }
        if responses:
            tokens = sum(len(r.token_ids) for r in responses)
            metrics["stale_tokens"] = stale_tokens(responses, version) / max(tokens, 1)
            metrics["advantage_abs"] = sum(abs(r.advantage) for r in responses) / len(responses)
            if self.phase.history is not None:
                ids = {r.prompt_id for r in responses}
                metrics["prompt_visits"] = sum(self.phase.history.visits(i) for i in ids) / len(ids)
        return metrics

    # -- beside the loop ---------------------------------------------------------------------------

    def _introduce(self) -> None:
        run_, world = self.run_, dist.get_world_size()
        layout = run_.layout
        self.sinks.say(
            f"[bold]{run_.config.objective.get('preset', 'dcpo-paper')}[/bold] on {run_.shape.model_type},"
            f" {run_.shape.layers} layers of {run_.shape.hidden}; {world} ranks ({run_.platform.name},"
            f" {run_.platform.backend}): tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context},"
            f" data {run_.data_parallel}"
        )
        # Rows left out are counted aloud, also without a console.
        self.sinks.announce(f"data: {self.prompts.summary()}")
        if self.held_out is not None:
            self.sinks.announce(f"evaluation: {self.held_out.summary()}")
        stops, template = self.phase.sampling.stop_token_ids, run_.config.data.template
        key = f"rollout.stop_token_ids=[{','.join(map(str, [*run_.config.rollout.stop_token_ids, '{}']))}]"
        for line in introduce(self.prompts.prompts[0], self.tokenizer, stops, template, key):
            self.sinks.announce(line)

    def _evaluate(self, step: int) -> None:
        if self.held_out is None:
            return
        self.watchdog.enter("evaluate", step)
        try:
            result = self._evaluated()
        except Stopped:
            self.sinks.announce(
                f"asked to stop while it waits for rollout servers: the evaluation of step {step} is left out"
            )
            return
        self.evaluations[step] = result
        self.sinks.evaluation(step, result)

    def _evaluated(self) -> dict[str, float]:
        config = self.run_.config
        return evaluate(
            self.engine,
            self.tokenizer,
            self.phase.rewarder,
            self.held_out.prompts,
            samples=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            stop_token_ids=self.phase.sampling.stop_token_ids,
            correct_at=config.reward.correct_at,
            seed=config.training.seed,
            progress=self.watchdog.progress,
        )

    def _save(self, name: str) -> str | None:
        """The current weights as a Hugging Face folder ``output/name``; collective. A sentence on every rank where it
        could not be written."""
        self.watchdog.enter("save", timeout_seconds=self.run_.config.checkpoint.timeout_seconds)
        return write_copy(self.gatherer.tensors(), self.folder / name, self.run_.hf_folder, self.sinks.warn)

    def _finish(self, train_seconds: float) -> dict:
        config, steps = self.run_.config, self.history_of_metrics

        def mean(name: str) -> float | None:
            return mean_of(steps, name)

        summary = {
            "preset": config.objective.get("preset", "dcpo-paper"),
            "seed": config.training.seed,
            "steps": config.training.steps,
            "updates": self.updates_done,
            "ranks": dist.get_world_size(),
            "train_seconds": train_seconds,
            "response_utilization_ratio": mean("response_utilization_ratio"),
            "token_clipping_ratio": mean("token_clipping_ratio"),
            "mismatch_abs": mean("mismatch_abs"),
            "stale_tokens": mean("stale_tokens"),
            "model": str(self.folder / "model"),
            "prompts": len(self.prompts),
            "rows_left_out": dict(self.prompts.skipped),
        }
        if self.evaluations:
            first, last = self.evaluations[min(self.evaluations)], self.evaluations[max(self.evaluations)]
            summary |= {
                "accuracy_before": first["accuracy"],
                "accuracy_after": last["accuracy"],
                "greedy_before": first["greedy"],
                "greedy_after": last["greedy"],
            }
        if dist.get_rank() == 0:
            try:
                (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
                if config.logging.report and steps:
                    draw_report(
                        self.folder / "metrics.jsonl",
                        self.folder / "report.png",
                        f"{summary['preset']}, seed {summary['seed']}",
                    )
            except OSError as error:
                self.sinks.warn(f"summary and report could not be written: {error.strerror or error}")
        self.sinks.say(
            f"the trained model is in {escape(str(self.folder / 'model'))}, metrics and summary.json beside it"
        )
        return summary

    def close(self, groups: bool = True) -> None:
        """Ends reward processes, sinks and, with ``groups``, the process groups."""
        self.watchdog.close()
        self.phase.drop_pending()
        self.phase.rewarder.close()
        self.engine.close()
        self.sinks.close()
        self.gpu.close()
        if groups:
            platforms.stop()
