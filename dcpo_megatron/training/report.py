"""One picture of a run: reward, accuracy, entropy, RUR, TCR and response length against steps, from ``metrics.jsonl``."""

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


def draw_report(metrics_file: str | os.PathLike, picture: str | os.PathLike, title: str) -> None:
    """Writes the picture (PNG). Raises OSError where a file cannot be read or written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics_file)
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    figure.suptitle(title)
    for axis, (name, label, extras) in zip(axes.flat, PANELS, strict=True):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), linewidth=1.4, color="tab:blue", label=name)
        for extra in extras:
            more = [(row["step"], row[extra]) for row in rows if row.get(extra) is not None]
            if more:
                mark = "o" if extra.startswith("eval_") else None
                axis.plot(
                    *zip(*more, strict=True),
                    linewidth=1.0,
                    marker=mark,
                    linestyle="--",
                    label=extra.replace("eval_", "held-out "),
                )
        if extras:
            axis.legend(fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
