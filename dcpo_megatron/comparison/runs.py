"""What the runs of a comparison measured, read back from their folders: one :class:`Run` a method and seed, and one
number a run for each figure.

The first visit of every prompt is over once as many responses were generated as all prompts have in one round: dynamic
sampling gets there in fewer steps. Seconds are those of the training steps, evaluations left out.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dcpo_megatron.comparison.plan import Plan
from dcpo_megatron.files import read_rows


@dataclass(frozen=True)
class Run:
    """A finished run. ``steps``: its rows of ``metrics.jsonl`` in order; ``evaluations``: step -> eval_* values;
    ``responses`` and ``seconds``: sums up to and with each step, from step 0 on."""

    method: str
    seed: int
    steps: list[dict]
    evaluations: dict[int, dict]
    responses: list[float]
    seconds: list[float]
    prompts: int
    group_size: int

    def mean(self, name: str, start: int = 0) -> float | None:
        """Mean of a metric over the steps after step ``start`` that have it; None without any."""
        values = [row[name] for row in self.steps[start:] if row.get(name) is not None]
        return math.fsum(values) / len(values) if values else None

    def total(self, name: str) -> float:
        return math.fsum(row.get(name) or 0.0 for row in self.steps)

    @property
    def first_visits(self) -> int:
        """Steps until every prompt was visited once."""
        return bisect.bisect_left(self.responses, self.prompts * self.group_size)

    def curve(self, name: str = "eval_accuracy", against: str = "steps") -> list[tuple[float, float]]:
        """Points of an evaluation's value against steps, responses or seconds."""
        place: Callable[[int], float] = {
            "steps": float,
            "responses": lambda step: self.responses[step],
            "seconds": lambda step: self.seconds[step],
        }[against]
        return [(place(step), row[name]) for step, row in sorted(self.evaluations.items()) if row.get(name) is not None]

    def final(self, name: str = "eval_accuracy") -> float | None:
        points = self.curve(name)
        return points[-1][1] if points else None

    def gain(self) -> float | None:
        """Accuracy after training less before."""
        points = self.curve()
        return points[-1][1] - points[0][1] if len(points) > 1 else None


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` on the straight lines between ``points`` (sorted by x); None outside of them."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    place = bisect.bisect_left([point[0] for point in points], x)
    (x1, y1) = points[place]
    if x == x1:
        return y1
    (x0, y0) = points[place - 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def reached(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The first x at which the lines between ``points`` are at ``level`` or above; None where they never are."""
    for place, (x, y) in enumerate(points):
        if y >= level:
            if place == 0:
                return x
            x0, y0 = points[place - 1]
            return x0 + (x - x0) * (level - y0) / (y - y0)
    return None


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run in ``folder`` has done ``steps`` steps and said so."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] >= steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_runs(plan: Plan) -> list[Run]:
    """Every finished run, in the plan's order."""
    found = []
    for method in plan.methods:
        for seed in plan.seeds:
            config, folder = plan.recipe(method, seed), plan.run_folder(method, seed)
            if is_finished(folder, config.training.steps):
                summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                rows = read_rows(folder / "metrics.jsonl")
                found.append(make_run(method, seed, rows, summary["prompts"], config.rollout.group_size))
    return found


def make_run(method: str, seed: int, rows: Sequence[dict], prompts: int, group_size: int) -> Run:
    """A run from the rows of its ``metrics.jsonl``."""
    steps = [row for row in rows if row.get("seconds") is not None]
    evaluations = {row["step"]: row for row in rows if row.get("eval_accuracy") is not None}
    sums = [[0.0, *accumulate(row[name] for row in steps)] for name in ("responses_generated", "seconds")]
    return Run(method, seed, steps, evaluations, *sums, prompts, group_size)
