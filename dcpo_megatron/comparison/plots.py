"""The pictures of a comparison: means over seeds, with the t interval as a band where there is more than one seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dcpo_megatron.comparison.runs import Run, interpolate
from dcpo_megatron.comparison.statistics import Interval, mean_interval

# (file, caption, panels); a panel: (title, metric, label of x)
PICTURES = (
    (
        "training.png",
        (
            "Reward, response utilisation, entropy, response length, gradient norm and the share of tokens whose upper"
            " DAC bound cannot bind"
        ),
        (
            ("reward", "reward"),
            ("RUR", "response_utilization_ratio"),
            ("entropy (nats a token)", "entropy"),
            ("response length (tokens)", "response_length"),
            ("gradient norm before clipping", "gradient_norm"),
            ("upper DAC bound vacuous", "vacuous_upper"),
        ),
    ),
    (
        "clipping.png",
        "Tokens whose gradient was clipped, and the bounds that they met",
        (
            ("TCR", "token_clipping_ratio"),
            ("beyond the upper bound", "clipped_upper"),
            ("below the lower bound", "clipped_lower"),
            ("beyond the cap", "clipped_cap"),
            ("mean lower bound", "bound_lower"),
            ("mean upper bound", "bound_upper"),
        ),
    ),
)
_GRID = 40


def band_over_seeds(
    runs: Sequence[Run], name: str = "eval_accuracy", against: str = "steps"
) -> list[tuple[float, Interval]]:
    """An evaluation's value of one method's runs, as an interval over seeds, at the points that all runs reach."""
    curves = [curve for run in runs if (curve := run.curve(name, against))]
    if not curves:
        return []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if against == "steps":
        places = [x for x, _ in curves[0] if first <= x <= last]
    else:
        places = [first + (last - first) * number / _GRID for number in range(_GRID + 1)]
    found = []
    for x in places:
        values = [value for curve in curves if (value := interpolate(curve, min(x, last))) is not None]
        found.append((x, mean_interval(values)))
    return found


def mean_over_seeds(runs: Sequence[Run], name: str) -> list[tuple[int, float]]:
    """A metric's mean over one method's runs at each step that all of them measured."""
    rows: dict[int, list[float]] = {}
    for run in runs:
        for row in run.steps:
            if row.get(name) is not None:
                rows.setdefault(row["step"], []).append(row[name])
    return [(step, sum(values) / len(values)) for step, values in sorted(rows.items()) if len(values) == len(runs)]


def draw(runs: Sequence[Run], folder: Path) -> list[tuple[Path, str]]:
    """Writes the pictures into ``folder``; returns (file, caption) of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(run.method for run in runs))
    by_method = {method: [run for run in runs if run.method == method] for method in methods}
    colours = {method: f"C{number}" for number, method in enumerate(methods)}

    def finish(figure, axes, file: str) -> Path:
        for axis in axes:
            axis.grid(alpha=0.3)
        lines = [pyplot.Line2D([], [], color=colours[method], label=method) for method in methods]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(8, len(methods)))
        figure.savefig(folder / file, dpi=100)
        pyplot.close(figure)
        return folder / file

    found = []
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained", sharey=True)
    for axis, against in zip(axes, ("steps", "responses", "seconds"), strict=True):
        for method in methods:
            points = band_over_seeds(by_method[method], against=against)
            x = [place for place, _ in points]
            axis.plot(x, [value.mean for _, value in points], color=colours[method], linewidth=1.5)
            if points and points[0][1].low is not None:
                low, high = [v.low for _, v in points], [v.high for _, v in points]
                axis.fill_between(x, low, high, color=colours[method], alpha=0.12, linewidth=0)
        axis.set_xlabel({"responses": "responses generated", "seconds": "seconds of training"}.get(against, against))
    axes[0].set_ylabel("held-out accuracy")
    found.append(
        (finish(figure, axes, "accuracy.png"), "Held-out accuracy against steps, responses generated and seconds")
    )

    for file, caption, panels in PICTURES:
        figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
        for axis, (title, name) in zip(axes.flat, panels, strict=True):
            for method in methods:
                points = mean_over_seeds(by_method[method], name)
                # An absent bound counts as a million: nothing to draw beside real ones.
                points = [(x, y) for x, y in points if abs(y) < 1e5]
                axis.plot([x for x, _ in points], [y for _, y in points], color=colours[method], linewidth=1.1)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step", fontsize=9)
        found.append((finish(figure, axes.flat, file), caption))
    return found
