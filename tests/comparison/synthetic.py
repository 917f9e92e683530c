"""Runs that were never run: rows of metrics with what a test wants to be true in them."""

import random

from dcpo_megatron.comparison.runs import Run, make_run

METHODS = ("grpo", "dapo", "gspo", "dcpo-paper", "dac-only", "sas-only", "otm-only")
# What the paper says: held-out accuracy at the end, RUR, TCR, rounds of sampling a step.
PAPER = {
    "grpo": (0.60, 0.44, 0.0100, 1),
    "dapo": (0.64, 0.80, 0.0110, 4),
    "gspo": (0.67, 0.45, 0.1400, 1),
    "dcpo-paper": (0.75, 0.72, 0.0010, 1),
    "dac-only": (0.66, 0.44, 0.0010, 1),
    "sas-only": (0.66, 0.72, 0.0100, 1),
    "otm-only": (0.66, 0.44, 0.0100, 1),
}
PROMPTS, GROUP, PER_STEP, STEPS = 32, 4, 8, 12


def rows(accuracy: float, rur: float, tcr: float, rounds: int, draw: random.Random, noise: float) -> list[dict]:
    """``metrics.jsonl`` of a run whose accuracy rises from 0.3 in a straight line; RUR of the first visits is 0.2."""
    found = [{"step": 0, "eval_accuracy": 0.3, "eval_greedy": 0.35}]
    end = accuracy + draw.gauss(0, noise)
    for step in range(1, STEPS + 1):
        first = step * rounds * PER_STEP <= PROMPTS
        found.append(
            {
                "step": step,
                "reward": 0.1,
                "responses_generated": float(PER_STEP * GROUP * rounds),
                "response_utilization_ratio": 0.2 if first else rur * (1 + draw.gauss(0, noise)),
                "token_clipping_ratio": tcr * (1 + draw.gauss(0, noise)),
                "clipped_upper": tcr / 2,
                "clipped_lower": tcr / 2,
                "clipped_cap": 0.0,
                "bound_lower": 0.8,
                "bound_upper": 1e6,
                "entropy": 0.5,
                "gradient_norm": 1.0,
                "response_length": 12.0,
                "updates": 4.0,
                "seconds": float(rounds) * (1 + abs(draw.gauss(0, noise))),
            }
        )
        if step % 3 == 0:
            value = 0.3 + (end - 0.3) * step / STEPS
            found.append({"step": step, "eval_accuracy": value, "eval_greedy": value})
    return found


def make(values: dict[str, tuple[float, float, float, int]] = PAPER, seeds: int = 5, noise: float = 0.01) -> list[Run]:
    """One run a method and seed."""
    return [
        make_run(method, seed, rows(*row, random.Random(f"{method}/{seed}"), noise), PROMPTS, GROUP)
        for method, row in values.items()
        for seed in range(seeds)
    ]


def even_length(response: str, ground_truth: str) -> float:
    """A reward that a model with random weights earns about half of the time."""
    return float(len(response) % 2 == 0)
