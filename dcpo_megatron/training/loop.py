"""The training loop. One step, top to bottom:

    prompts -> responses -> rewards -> advantages -> minibatches -> old log-probs -> updates -> new weights to the engine -> metrics

:class:`Trainer` builds every part once (:meth:`Trainer.build`) and :meth:`Trainer.run` is the loop itself.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from rich.markup import escape

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.data import DataError, PromptOptions, PromptSampler, PromptSet, Response, load_prompts
from dcpo_megatron.data.packing import PackingOptions
from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.mcore.layout import alignment, make_groups, rank_position
from dcpo_megatron.mcore.model import DTYPES, ModelOptions, OptimizerOptions
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.rewards import Rewarder
from dcpo_megatron.rollout import EmbeddedEngine, RolloutEngine, SamplingParams
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.config import ConfigError, to_yaml
from dcpo_megatron.training.evaluation import evaluate
from dcpo_megatron.training.gpu import GpuMonitor
from dcpo_megatron.training.metrics import update_metrics
from dcpo_megatron.training.minibatches import plan_minibatch, split_minibatches
from dcpo_megatron.training.report import draw_report
from dcpo_megatron.training.rollout_phase import RolloutPhase, RolloutResult
from dcpo_megatron.training.sinks import Sinks
from dcpo_megatron.training.tokenizer import load_tokenizer, stop_token_ids
from dcpo_megatron.weights.hf_folder import write_hf_folder
from dcpo_megatron.weights.transfer import WeightGatherer, load_hf_weights


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
    updates_done: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    history_of_metrics: list[dict[str, float]] = field(default_factory=list)

    # -- building ---------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, run_: CheckedRun) -> Trainer:
        """Starts the process groups and builds data, model, optimizer and engine. Raises the errors of each part."""
        config = run_.config
        folder = _writable(Path(config.output))
        tokenizer = load_tokenizer(config.model.path, run_.shape.vocab)
        stops = stop_token_ids(config.model.path, tokenizer)
        prompts = load_prompts(config.data.files, tokenizer, PromptOptions(**config.data.model_dump(exclude={"files"})))
        held_out = None
        if config.evaluation.files:
            options = config.data.model_dump(exclude={"files"}) | {
                "limit": config.evaluation.limit,
                "on_duplicate_id": config.evaluation.on_duplicate_id,
            }
            try:
                held_out = load_prompts(config.evaluation.files, tokenizer, PromptOptions(**options))
            except DataError as error:
                raise DataError(f"evaluation.files: {error}") from None
        rewarder = Rewarder(
            config.reward.function, config.reward.timeout_seconds, config.reward.failure_reward, config.reward.workers
        )
        sampler = PromptSampler(len(prompts), config.training.seed)
        if config.rollout.prompts_per_step > len(prompts):
            raise ConfigError(
                f"rollout.prompts_per_step={config.rollout.prompts_per_step}, but data.files hold {len(prompts)} usable prompts: "
                "lower it or bring more prompts"
            )

        platforms.start(run_.platform, config.training.timeout_seconds)
        make_groups(run_.layout, timeout_minutes=math.ceil(config.training.timeout_seconds / 60))
        position = rank_position()
        options = ModelOptions(
            dtype=config.model.dtype,
            transformer_engine=config.model.transformer_engine,
            recompute=config.model.recompute,
            overlap_p2p=config.parallel.overlap_p2p,
        )

        def model() -> PolicyModel:
            made = PolicyModel.create(
                run_.shape, run_.layout, options, run_.platform, position,
                seed=config.training.seed,
                temperature=config.rollout.temperature,
                packed=config.training.packing == "packed",
                head_chunk_tokens=config.model.head_chunk_tokens,
            )  # fmt: skip
            load_hf_weights(made, config.model.path)
            return made

        policy = model()
        reference = model() if run_.objective.kl_coef else None
        settings = config.optimizer.model_dump(exclude={"warmup_steps"})
        policy.make_trainable(OptimizerOptions(**settings))
        gatherer = WeightGatherer(policy)
        engine = EmbeddedEngine(
            config.model.path,
            device=run_.platform.device,
            dtype=DTYPES[config.model.dtype],
            max_batch=config.rollout.batch_size,
        )
        sas = run_.objective.advantage == "sas"
        phase = RolloutPhase(
            engine=engine,
            tokenizer=tokenizer,
            rewarder=rewarder,
            objective=run_.objective,
            history=RewardHistory(run_.objective.std_ddof) if sas else None,
            sampling=SamplingParams(
                config.rollout.max_response_tokens,
                config.rollout.temperature,
                config.rollout.top_p,
                config.rollout.top_k,
                stops,
            ),
            group_size=config.rollout.group_size,
            correct_at=config.reward.correct_at,
            seed=config.training.seed,
            device=run_.platform.device,
        )
        is_writer = dist.get_rank() == 0
        if is_writer:
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        sinks = Sinks(config, folder, is_writer, config.training.steps)
        packing = PackingOptions(
            max_tokens=config.training.micro_batch_tokens,
            packed=policy.packed,
            align=alignment(run_.layout.tensor, run_.layout.context, run_.layout.sequence_parallel),
            attention_length=6 * run_.shape.hidden,
        )
        return cls(
            run_, folder, tokenizer, prompts, held_out, sampler, policy, reference, gatherer, engine, phase, packing, sinks,
            GpuMonitor(run_.platform),
        )  # fmt: skip

    # -- the loop ---------------------------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Trains for ``training.steps`` steps; returns (and writes) the summary."""
        config = self.run_.config
        self._introduce()
        self._evaluate(0)
        started = time.perf_counter()
        for step in range(1, config.training.steps + 1):
            metrics = self.step(step)
            self.history_of_metrics.append(metrics)
            self.sinks.step(step, metrics)
            every = config.evaluation.every
            if every and step % every == 0 and step < config.training.steps:
                self._evaluate(step)
            if config.training.save_every and step % config.training.save_every == 0 and step < config.training.steps:
                self._save(f"step-{step}")
        train_seconds = time.perf_counter() - started
        if config.training.steps:
            self._evaluate(config.training.steps)
        self._save("model")
        return self._finish(train_seconds)

    def step(self, step: int) -> dict[str, float]:
        """One step (numbered from 1). Returns its metrics: the same on every rank, but for seconds and GPU readings."""
        config = self.run_.config
        started = time.perf_counter()
        rollout = self.phase.run(
            lambda: [self.prompts.prompts[i] for i in self.sampler.next(config.rollout.prompts_per_step)],
            step,
            prompts_wanted=config.rollout.prompts_per_step,
            max_rounds=config.rollout.max_sampling_rounds,
            progress=self.sinks.progress,
        )
        responses = rollout.responses
        minibatches = [
            self._plan(responses, indices)
            for indices in split_minibatches(responses, config.training.minibatch_prompts)
        ]

        clock = time.perf_counter()
        self._fill_old_logprobs(minibatches)
        seconds_old = time.perf_counter() - clock

        clock = time.perf_counter()
        updates = []
        for micro_batches in minibatches:
            updates.append(self.policy.update(micro_batches, self.run_.objective, self._lr(step)))
            self.updates_done += 1
        seconds_update = time.perf_counter() - clock

        clock = time.perf_counter()
        self.engine.load_weights(self.gatherer.tensors(), version=step)
        seconds_publish = time.perf_counter() - clock

        seconds = time.perf_counter() - started
        return (
            self._rollout_metrics(rollout)
            | update_metrics(updates)
            | {
                "seconds": seconds,
                "seconds_rollout": rollout.seconds["rollout"],
                "seconds_reward": rollout.seconds["reward"],
                "seconds_advantage": rollout.seconds["advantage"],
                "seconds_old_logprobs": seconds_old,
                "seconds_update": seconds_update,
                "seconds_publish": seconds_publish,
                "tokens_per_second": rollout.totals["tokens"] / seconds,
            }
            | self.gpu.read()
        )

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
        """Old (and reference) log-probs of the whole rollout batch, before its first update, in the very micro-batches that the updates will use."""
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

    def _rollout_metrics(self, rollout: RolloutResult) -> dict[str, float]:
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
            metrics["advantage_abs"] = sum(abs(r.advantage) for r in responses) / len(responses)
            if self.phase.history is not None:
                ids = {r.prompt_id for r in responses}
                metrics["prompt_visits"] = sum(self.phase.history.visits(i) for i in ids) / len(ids)
        return metrics

    # -- beside the loop --------------------------------------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        run_, world = self.run_, dist.get_world_size()
        layout = run_.layout
        self.sinks.say(
            f"[bold]{run_.config.objective.get('preset', 'dcpo-paper')}[/bold] on {run_.shape.model_type}, {run_.shape.layers} layers of {run_.shape.hidden}; "
            f"{world} ranks ({run_.platform.name}, {run_.platform.backend}): tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context}, "
            f"data {run_.data_parallel}"
        )
        # Rows left out are counted aloud, also without a console.
        self.sinks.announce(f"data: {self.prompts.summary()}")
        if self.held_out is not None:
            self.sinks.announce(f"evaluation: {self.held_out.summary()}")

    def _evaluate(self, step: int) -> None:
        if self.held_out is None:
            return
        config = self.run_.config
        result = evaluate(
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
            device=self.run_.platform.device,
        )
        self.evaluations[step] = result
        self.sinks.evaluation(step, result)

    def _save(self, name: str) -> None:
        """The current weights as a Hugging Face folder ``output/name``; collective."""
        tensors = self.gatherer.tensors()
        if dist.get_rank() == 0:
            write_hf_folder(self.folder / name, tensors, self.run_.config.model.path)
        for _ in tensors:
            pass
        dist.barrier()

    def _finish(self, train_seconds: float) -> dict:
        config, steps = self.run_.config, self.history_of_metrics

        def mean(name: str) -> float | None:
            values = [metrics[name] for metrics in steps if name in metrics]
            return sum(values) / len(values) if values else None

        summary = {
            "preset": config.objective.get("preset", "dcpo-paper"),
            "seed": config.training.seed,
            "steps": config.training.steps,
            "updates": self.updates_done,
            "ranks": dist.get_world_size(),
            "train_seconds": train_seconds,
            "response_utilization_ratio": mean("response_utilization_ratio"),
            "token_clipping_ratio": mean("token_clipping_ratio"),
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
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            if config.logging.report and steps:
                draw_report(
                    self.folder / "metrics.jsonl",
                    self.folder / "report.png",
                    f"{summary['preset']}, seed {summary['seed']}",
                )
        self.sinks.say(
            f"the trained model is in {escape(str(self.folder / 'model'))}, metrics and summary.json beside it"
        )
        return summary

    def close(self, groups: bool = True) -> None:
        """Ends reward processes, sinks and, with ``groups``, the process groups."""
        self.phase.rewarder.close()
        self.engine.close()
        self.sinks.close()
        self.gpu.close()
        if groups:
            platforms.stop()


def _writable(folder: Path) -> Path:
    """``folder``, made if need be. Raises ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output={folder} cannot be made ({error.strerror}): name a folder that can be written"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output={folder} is not writable: name a folder that can be written")
    return folder
