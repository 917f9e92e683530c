"""``dcpo report``: a run as one HTML file that needs nothing else and fits a phone: curves, single responses token by
token, prompts over their visits.

    metrics.jsonl   -> curves                              every run has it
    samples.jsonl   -> responses, visits of prompts        runs with logging.samples; see samples.py
    config.yaml     -> what it was, in a line

Pictures are SVG inside the page. Without scripts everything can be read but the numbers of a token, which a tap shows
(a pointer shows them without).
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

import yaml

from dcpo_megatron.files import read_rows
from dcpo_megatron.monitor.curves import PANELS, draw_panel
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

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; --right: #1a7f37; --wrong: #b3261e; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #aaa; --right: #57c76c; --wrong: #ff7b72; --page: #151515 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: .75rem .75rem 5rem;
  background: var(--page) }
h1 { font-size: 1.4rem; margin: .2rem 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 1.8rem 0 .4rem }
p, li { max-width: 46rem } .soft { color: var(--soft); font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: .8rem 0 }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .6rem }
.tiles b { display: block; font-size: 1.2rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .5rem }
img { width: 100%; height: auto; background: #fff; border-radius: .4rem } .one { max-width: 34rem }
details { border-top: 1px solid var(--line) }
summary { padding: .6rem 0; cursor: pointer; font-weight: 600; overflow-wrap: anywhere }
article { border-left: 4px solid var(--line); padding: 0 0 0 .6rem; margin: .8rem 0 }
.up { border-color: var(--right) } .down { border-color: var(--wrong) }
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 }
.tokens span, .key span { border-radius: 3px; padding: 1px 0 } .key span { padding: 1px .4rem }
.clip { outline: 2px solid #c026d3; outline-offset: -1px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
#told { position: fixed; inset: auto 0 0 0; padding: .6rem .75rem; background: var(--page);
  border-top: 2px solid var(--line); display: none; font-size: .9rem }
"""
_SCRIPT = """
const told = document.getElementById("told");
document.addEventListener("click", event => {
  const token = event.target.closest(".tokens span");
  told.style.display = token ? "block" : "none";
  if (token) told.textContent = JSON.stringify(token.textContent) + ": " + token.title;
});
"""


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
    title = folder.resolve().name
    parts = [
        f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(_what(folder))}</p>', _tiles(rows),
        "<h2>Curves</h2>", f'<div class="curves">{"".join(_curves(rows))}</div>',
        "<h2>Responses, token by token</h2>", _responses(responses) if responses else _NONE,
        "<h2>Prompts over their visits</h2>", _prompts(visits) if visits else _NONE,
    ]  # fmt: skip
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f' initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + f'\n<div id="told"></div><script>{_SCRIPT}</script></body></html>\n'
    )


_NONE = "<p>The run kept none: set <code>logging.samples</code> to a number of steps.</p>"


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


def _tiles(rows: list[dict]) -> str:
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
    return '<div class="tiles">' + "".join(f"<div>{escape(a)}<b>{escape(b)}</b></div>" for a, b in found) + "</div>"


def _curves(rows: list[dict]):
    for panel in (*PANELS, *_MORE):
        figure, axis = _figure()
        if draw_panel(axis, rows, *panel):
            yield _image(figure, panel[1])


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    return figure, figure.add_subplot()


def _image(figure, name: str, kind: str = "") -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{kind and f" class={kind}"} alt="{escape(name)}" src="data:image/svg+xml;base64,{data}">'


def _responses(responses: list[dict]) -> str:
    parts = [
        (
            f'<p class="key"><span style="{_colour(math.exp(-_FULL_COLOUR))}">ratio {math.exp(-_FULL_COLOUR):.2f} or'
            f' less</span> <span>1</span> <span style="{_colour(math.exp(_FULL_COLOUR))}">{math.exp(_FULL_COLOUR):.2f}'
            ' or more</span> <span class="clip">clipped</span></p>'
        ),
        (
            '<p class="soft">Ratios of the current to the old probability, as the last update of the step saw them;'
            " where a step has one update, all are 1. Left edge: green where the advantage is above 0, red where it is"
            " below. Tap a token for its numbers.</p>"
        ),
    ]
    steps = sorted({row["step"] for row in responses}, reverse=True)
    for step in steps:
        mine = [row for row in responses if row["step"] == step]
        parts.append(
            f"<details{' open' if step == steps[0] else ''}><summary>Step {step}: {len(mine)} responses, update"
            f" {mine[0]['minibatch']} of {mine[0]['minibatch']}</summary>"
        )
        parts += [_response(row) for row in mine]
        parts.append("</details>")
    return "\n".join(parts)


def _response(row: dict) -> str:
    advantage, tokens = row["advantage"], row["tokens"]
    clipped = sum(bool(token[5]) for token in tokens)
    side = "up" if advantage > 0 else "down" if advantage < 0 else ""
    head = (
        f"<b>{escape(row['prompt_id'])}</b>: {'right' if row['correct'] else 'wrong'}, reward {row['reward']:g},"
        f" advantage {advantage:+.3f}, {row['length']} tokens, {clipped} clipped"
    )
    if row["length"] > TOKENS:
        head += f" (the first {TOKENS} are shown)"
    return (
        f'<article class="{side}"><div>{head}</div><div class="tokens">{"".join(map(_token, tokens))}</div></article>'
    )


def _token(token: list) -> str:
    text, old_logprob, ratio, lower, upper, clipped = token
    if ratio is None or old_logprob is None:
        return f"<span>{escape(text)}</span>"
    bounds = f"{'-' if lower is None else f'{lower:.3f}'} to {'none' if upper is None else f'{upper:.3f}'}"
    told = (
        f"old probability {math.exp(old_logprob):.4g}, ratio {ratio:.4f}, bounds {bounds},"
        f" {f'clipped ({clipped})' if clipped else 'not clipped'}"
    )
    kind = ' class="clip"' if clipped else ""
    return f'<span{kind} style="{_colour(ratio)}" title="{told}">{escape(text) or "·"}</span>'


def _colour(ratio: float) -> str:
    distance = math.log(ratio) / _FULL_COLOUR if ratio > 0 else -1.0
    return f"background:rgba({'30,110,240' if distance > 0 else '240,120,0'},{min(1, abs(distance)) * 0.6:.2f})"


def _prompts(visits: list[dict]) -> str:
    parts = [
        '<p class="soft">Dots: the rewards of a visit (larger: more responses). Line and band: mean and standard'
        " deviation of all rewards so far, as SAS knows them. The table has the advantages that the best and the worst"
        " reward of each visit gave.</p>"
    ]
    for number, prompt_id in enumerate(dict.fromkeys(row["prompt_id"] for row in visits)):
        mine = [row for row in visits if row["prompt_id"] == prompt_id]
        parts.append(
            f"<details{'' if number else ' open'}><summary>{escape(prompt_id)}: {len(mine)}"
            f" visits</summary>{_image(_history(mine), f'rewards of {prompt_id}', 'one')}{_table(mine)}</details>"
        )
    return "\n".join(parts)


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


def _table(visits: list[dict]) -> str:
    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    head = ("visit", "step", "mean of visit", "mean of all", "std of all", "A of best", "A of worst", "A not 0")
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in visits:
        rewards, advantages = row["rewards"], row["advantages"]
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        cells = (
            row["visits"], row["step"], show(sum(rewards) / len(rewards)), show(row["mean"]), show(row["std"]),
            show(advantages[order[-1]], "+.3f"), show(advantages[order[0]], "+.3f"),
            f"{sum(a != 0 for a in advantages)} of {len(advantages)}",
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
