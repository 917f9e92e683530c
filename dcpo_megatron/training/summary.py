"""``summary.json`` and the picture of a run that has done all its steps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch.distributed as dist
from rich.markup import escape

from dcpo_megatron.monitor.curves import draw_report
from dcpo_megatron.monitor.mismatch import mean_of

if TYPE_CHECKING:
    from dcpo_megatron.training.loop import Trainer

_MEANS = ("response_utilization_ratio", "token_clipping_ratio", "mismatch_abs", "stale_tokens")


def write_summary(trainer: Trainer) -> dict:
    """Returns the summary, the same on every rank; rank 0 writes it, and the picture where ``logging.report`` asks."""
    config, progress, prompts = trainer.run_.config, trainer.progress, trainer.data.prompts
    model, sinks = trainer.folder / "model", trainer.monitors.sinks
    summary = {
        "preset": config.objective.get("preset", "dcpo-paper"),
        "seed": config.training.seed,
        "steps": config.training.steps,
        "updates": progress.updates,
        "ranks": dist.get_world_size(),
        "train_seconds": progress.seconds,
        **{name: mean_of(progress.metrics, name) for name in _MEANS},
        "model": str(model),
        "prompts": len(prompts),
        "rows_left_out": dict(prompts.skipped),
    }
    if progress.evaluations:
        first = progress.evaluations[min(progress.evaluations)]
        last = progress.evaluations[max(progress.evaluations)]
        summary |= {
            "accuracy_before": first["accuracy"],
            "accuracy_after": last["accuracy"],
            "greedy_before": first["greedy"],
            "greedy_after": last["greedy"],
        }
    if dist.get_rank() == 0:
        try:
            (trainer.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            if config.logging.report and progress.metrics:
                draw_report(
                    trainer.folder / "metrics.jsonl",
                    trainer.folder / "report.png",
                    f"{summary['preset']}, seed {summary['seed']}",
                )
        except OSError as error:
            sinks.warn(f"summary and report could not be written: {error.strerror or error}")
    sinks.say(f"the trained model is in {escape(str(model))}, metrics and summary.json beside it")
    return summary
