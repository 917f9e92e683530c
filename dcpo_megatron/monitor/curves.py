"""One picture of a run: reward, accuracy, entropy, RUR, TCR and response length against steps, from
``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from pathlib import Path

PANELS = (
    ("reward", "reward (mean over responses)", ()),
    ("accuracy", "accuracy", ("eval_accuracy", "eval_greedy")),
    ("entropy", "entropy (nats a token)", ()),
    ("response_utilization_ratio", "RUR: responses with A ≠ 0", ()),
    ("token_clipping_ratio", "TCR: tokens clipped", ("clipped_upper", "clipped_lower", "clipped_cap")),
    ("response_length", "response length (tokens)", ()),
)


def read_metrics(file: str | os.PathLike) -> list[dict]:
    """The lines of a ``metrics.jsonl``. A last line cut short by a kill is left out."""
    rows = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_panel(axis, rows: list[dict], name: str, label: str, extras: tuple[str, ...]) -> bool:
    """One metric, and others beside it, against steps; returns whether the run has any of them."""
    drawn = False
    for metric in (name, *extras):
        points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if not points:
            continue
        drawn = True
        style = {"linewidth": 1.4, "color": "tab:blue"} if metric == name else {"linewidth": 1.0, "linestyle": "--"}
        mark = "o" if metric.startswith("eval_") else None
        axis.plot(*zip(*points, strict=True), marker=mark, label=metric.replace("eval_", "held-out "), **style)
    if extras and drawn:
        axis.legend(fontsize=8)
    axis.set_title(label, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.3)
    return drawn


def draw_report(metrics_file: str | os.PathLike, picture: str | os.PathLike, title: str) -> None:
    """Writes the picture (PNG). Raises OSError where a file cannot be read or written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics_file)
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    figure.suptitle(title)
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        draw_panel(axis, rows, *panel)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
