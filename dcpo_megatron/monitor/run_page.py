"""``dcpo report``: a run as one HTML file that needs nothing else and fits a phone: curves, single responses token by
token, prompts over their visits.

    metrics.jsonl   -> curves                              every run has it
    samples.jsonl   -> responses, visits of prompts        runs with logging.samples; see samples.py
    config.yaml     -> what it was, in a line

What is read becomes values here; templates/run.html is the page.
Pictures are SVG inside the page. Without scripts everything can be read but the numbers of a token, which a tap shows
(a pointer shows them without).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import yaml

from dcpo_megatron.files import read_rows
from dcpo_megatron.monitor.curves import PANELS, draw_panel
from dcpo_megatron.monitor.pages import picture, render
from dcpo_megatron.monitor.samples import SAMPLES, TOKENS

# Beside those of report.png.
_MORE = (
    ("gradient_norm", "gradient norm before clipping", ()),
    ("advantage_abs", "mean |advantage|", ()),
    ("bound_upper", "mean clip bounds", ("ratio", "bound_lower")),
    ("mismatch_abs", "|log p training - log p rollout|", ()),
    ("truncated", "responses cut at the limit", ()),
    ("seconds", "seconds a step", ("seconds_rollout", "seconds_forward_backward")),
)
_FULL_COLOUR = 0.25  # |ln ratio| of the strongest colour
_VISIT = ("visit", "step", "mean of visit", "mean of all", "std of all", "A of best", "A of worst", "A not 0")


class ReportError(ValueError):
    """There is nothing to show; one sentence."""


def make_page(folder: Path) -> str:
    """The page of the run in ``folder``. Raises ReportError where it holds no run."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise ReportError(f"{folder} has no metrics.jsonl with a step in it: name a run's folder, its output=")
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text; and the same run gives the same page.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dcpo"})
    samples = read_rows(folder / SAMPLES)
    responses = [row for row in samples if row.get("kind") == "response"]
    visits = [row for row in samples if row.get("kind") == "visit"]
    return render(
        "run.html",
        title=folder.resolve().name,
        what=_what(folder),
        tiles=_tiles(rows),
        curves=list(_curves(rows)),
        responses=list(_by_step(responses)),
        prompts=list(_prompts(visits)),
        visit_columns=_VISIT,
        kept_tokens=TOKENS,
        weakest=math.exp(-_FULL_COLOUR),
        strongest=math.exp(_FULL_COLOUR),
        colour=_colour,
        told=_told,
    )


def _what(folder: Path) -> str:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        objective = config["objective"]
        preset = objective.get("preset", "dcpo-paper")
        changed = ", ".join(f"{key} {value}" for key, value in objective.items() if key != "preset")
        return (
            f"{preset}{f' ({changed})' if changed else ''}; model {config['model']['path']};"
            f" {config['rollout']['prompts_per_step']} prompts x {config['rollout']['group_size']} responses a step;"
            f" seed {config['training']['seed']}"
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return "no config.yaml beside its metrics"


def _tiles(rows: list[dict]) -> list[tuple[str, str]]:
    def values(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    found = [("steps", f"{max(row['step'] for row in rows):,}")]
    for name, label in (("eval_accuracy", "held-out accuracy"), ("reward", "reward"), ("accuracy", "accuracy")):
        if series := values(name):
            found.append((f"{label}, first and last", f"{series[0]:.3f} → {series[-1]:.3f}"))
    for name, label in (("response_utilization_ratio", "RUR, mean"), ("token_clipping_ratio", "TCR, mean")):
        if series := values(name):
            found.append((label, f"{100 * sum(series) / len(series):.3g} %"))
    if series := values("seconds"):
        found.append(("seconds of steps", f"{sum(series):,.0f}"))
    return found


def _curves(rows: list[dict]) -> Iterator[tuple[str, str]]:
    for panel in (*PANELS, *_MORE):
        figure, axis = _figure()
        if draw_panel(axis, rows, *panel):
            yield panel[1], _svg(figure)


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return picture("svg+xml", file.getvalue())


def _by_step(responses: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    for step in sorted({row["step"] for row in responses}, reverse=True):
        yield step, [row for row in responses if row["step"] == step]


def _told(old_logprob: float, ratio: float, lower: float | None, upper: float | None, clipped: str) -> str:
    bounds = f"{'-' if lower is None else f'{lower:.3f}'} to {'none' if upper is None else f'{upper:.3f}'}"
    return (
        f"old probability {math.exp(old_logprob):.4g}, ratio {ratio:.4f}, bounds {bounds},"
        f" {f'clipped ({clipped})' if clipped else 'not clipped'}"
    )


def _colour(ratio: float) -> str:
    distance = math.log(ratio) / _FULL_COLOUR if ratio > 0 else -1.0
    return f"background:rgba({'30,110,240' if distance > 0 else '240,120,0'},{min(1, abs(distance)) * 0.6:.2f})"


def _prompts(visits: list[dict]) -> Iterator[tuple[str, str, list[tuple]]]:
    """Each prompt: its name, its picture, its rows of the table."""
    for prompt_id in dict.fromkeys(row["prompt_id"] for row in visits):
        mine = [row for row in visits if row["prompt_id"] == prompt_id]
        yield prompt_id, _svg(_history(mine)), [_visit(row) for row in mine]


def _history(visits: list[dict]):
    figure, axis = _figure()
    counts: dict[tuple[int, float], int] = {}
    for row in visits:
        for reward in row["rewards"]:
            counts[row["visits"], reward] = counts.get((row["visits"], reward), 0) + 1
    x, y = zip(*counts, strict=True)
    axis.scatter(x, y, s=[8 * n for n in counts.values()], alpha=0.5, linewidths=0)
    known = [(row["visits"], row["mean"], row["std"]) for row in visits if row["mean"] is not None]
    if known:
        at, mean, std = zip(*known, strict=True)
        axis.plot(at, mean, color="tab:orange", linewidth=1.4)
        low, high = [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)]
        axis.fill_between(at, low, high, color="tab:orange", alpha=0.15, linewidth=0)
    axis.set_xlabel("visit", fontsize=9)
    axis.set_ylabel("reward", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    return figure


def _visit(row: dict) -> tuple:
    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    rewards, advantages = row["rewards"], row["advantages"]
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    return (
        row["visits"], row["step"], show(sum(rewards) / len(rewards)), show(row["mean"]), show(row["std"]),
        show(advantages[order[-1]], "+.3f"), show(advantages[order[0]], "+.3f"),
        f"{sum(a != 0 for a in advantages)} of {len(advantages)}",
    )  # fmt: skip
