"""Evaluations of a run: its held-out prompts, with the current weights, at the steps that ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpo_megatron.evaluation.during_training import evaluate
from dcpo_megatron.launch.signals import Stopped

if TYPE_CHECKING:
    from dcpo_megatron.training.loop import Trainer


def evaluate_held_out(trainer: Trainer, step: int) -> None:
    """Evaluates after ``step`` steps, where the run has held-out prompts; collective. One that must stop while it waits
    for rollout servers is left out."""
    data, config, monitors = trainer.data, trainer.run_.config, trainer.monitors
    if data.held_out is None:
        return
    monitors.watchdog.enter("evaluate", step)
    try:
        result = evaluate(
            trainer.engine,
            data.tokenizer,
            trainer.phase.rewarder,
            data.held_out.prompts,
            samples=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            stop_token_ids=data.stop_token_ids,
            correct_at=config.reward.correct_at,
            seed=config.training.seed,
            progress=monitors.watchdog.progress,
        )
    except Stopped:
        monitors.sinks.announce(
            f"asked to stop while it waits for rollout servers: the evaluation of step {step} is left out"
        )
        return
    trainer.progress.evaluations[step] = result
    monitors.sinks.evaluation(step, result)
