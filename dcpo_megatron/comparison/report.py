"""The report of a comparison: verdicts on the paper's claims, a table of methods, pictures; and every number as CSV.

OUTPUT/report/report.html   one file, pictures inside        runs.csv         one row a run
              report.md     the same, with the PNG files     steps.csv        one row a run and step
              plan.yaml     what was compared                evaluations.csv  one row a run and evaluation
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from dcpo_megatron.comparison import claims as judged
from dcpo_megatron.comparison.claims import Claim, Part
from dcpo_megatron.comparison.plan import Plan
from dcpo_megatron.comparison.plots import draw
from dcpo_megatron.comparison.runs import Run, interpolate
from dcpo_megatron.comparison.statistics import CONFIDENCE, Interval, mean_interval
from dcpo_megatron.comparison.study_page import Block, Heading, Paragraph, Picture, Table, as_html, as_markdown

STEP_COLUMNS = (
    "reward", "accuracy", "response_length", "truncated", "responses_generated", "responses_trained", "sampling_rounds",
    "response_utilization_ratio", "advantage_abs", "token_clipping_ratio", "clipped_upper", "clipped_lower",
    "clipped_cap", "ratio",
    "bound_lower", "bound_upper", "vacuous_upper", "entropy", "gradient_norm", "loss", "updates", "updates_skipped",
    "tokens_trained",
    "mismatch_abs", "seconds", "seconds_rollout",
)  # fmt: skip

# One number a run: (column, what it is, how it is shown).
FIGURES: tuple[tuple[str, str, str, Callable[[Run], float | None]], ...] = (
    ("accuracy_before", "accuracy before", ".3f", lambda run: _first(run.curve())),
    ("accuracy_after", "accuracy after", ".3f", Run.final),
    ("greedy_after", "greedy after", ".3f", lambda run: run.final("eval_greedy")),
    ("responses", "responses generated", ",.0f", lambda run: run.responses[-1]),
    ("seconds", "seconds of training", ".0f", lambda run: run.seconds[-1]),
    ("updates", "updates", ".0f", lambda run: run.total("updates")),
    ("rur", "RUR after the first visits", ".3f", judged.rur),
    ("tcr", "TCR", ".5f", judged.tcr),
    ("clipped_upper", "beyond the upper bound", ".5f", lambda run: run.mean("clipped_upper")),
    ("clipped_lower", "below the lower bound", ".5f", lambda run: run.mean("clipped_lower")),
    ("clipped_cap", "beyond the cap", ".6f", lambda run: run.mean("clipped_cap")),
    ("entropy_last", "entropy, last tenth of the steps", ".3f", lambda run: run.mean("entropy", _last_tenth(run))),
    ("length_last", "response length, last tenth", ".1f", lambda run: run.mean("response_length", _last_tenth(run))),
    ("gradient_norm", "gradient norm", ".2f", lambda run: run.mean("gradient_norm")),
    ("responses_per_point", "responses a point of accuracy gained", ",.0f", judged.responses_per_point),
)


def write_report(plan: Plan, runs: Sequence[Run]) -> str:
    """Writes all files; returns the verdicts and where the report is, for the console. ``runs`` must not be empty."""
    folder = plan.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    claims = judged.judge_claims(runs)
    (folder / "plan.yaml").write_text(
        yaml.safe_dump(plan.model_dump(mode="json", exclude={"output"}), sort_keys=False), encoding="utf-8"
    )
    _write_csv(folder / "runs.csv", [_figures(run) for run in runs])
    _write_csv(folder / "steps.csv", (row for run in runs for row in _steps(run)))
    _write_csv(folder / "evaluations.csv", (row for run in runs for row in _evaluations(run)))
    blocks = _blocks(plan, runs, claims, draw(runs, folder))
    (folder / "report.md").write_text(as_markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(as_html(blocks, "Comparison"), encoding="utf-8")
    lines = [f"{claim.verdict:<14}  {claim.text}" for claim in claims]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def _blocks(plan: Plan, runs: Sequence[Run], claims: Sequence[Claim], pictures) -> list[Block]:
    seeds = sorted({run.seed for run in runs})
    total = len(plan.methods) * len(plan.seeds)
    blocks: list[Block] = [Heading("Comparison", 1), Paragraph(_introduction(plan, runs, seeds, total))]
    blocks += [
        Heading("The paper's claims"),
        Table(
            ["claim", "the paper", "measured", "verdict"],
            [[claim.text, claim.paper, _measured(claim), claim.verdict] for claim in claims],
            mark=3,
        ),
        Paragraph(
            f"Intervals are t intervals at {CONFIDENCE:.0%} over seeds, of differences (and of logarithms of ratios)"
            " between two methods at the same seed: the same start model, the same prompts in the same order."
            " Reproduced: the whole interval is beyond the limit; not reproduced: it is on the other side; undecided:"
            " the limit lies within it. A claim of several parts needs all of them. Verdicts are not corrected for the"
            " number of claims."
        ),
        Heading("Methods"),
        _methods_table(runs),
        Paragraph(
            f"Mean over seeds, with the {CONFIDENCE:.0%} t interval where there is more than one. Accuracy is on"
            " held-out prompts, sampled at temperature 1. RUR is the mean over the steps after the first visit of"
            " every prompt, TCR and its parts the mean over all steps; seconds leave evaluations out. At equal"
            " responses and seconds: accuracy, interpolated between evaluations, where the run with the fewest ended."
        ),
    ]
    blocks += [Heading("Curves")] + [Picture(file, caption) for file, caption in pictures]
    blocks += [Heading("What differs between the methods"), _objectives_table(plan)]
    return blocks


def _introduction(plan: Plan, runs: Sequence[Run], seeds: Sequence[int], total: int) -> str:
    config = plan.recipe(next(iter(plan.methods)), plan.seeds[0])
    rollout, training = config.rollout, config.training
    text = (
        f"{len(runs)} of {total} runs: {len({run.method for run in runs})} methods, seeds {', '.join(map(str, seeds))}."
        f" Each run: {training.steps} steps of {rollout.prompts_per_step} prompts x {rollout.group_size} responses,"
        f" minibatches of {training.minibatch_prompts} prompts, {runs[0].prompts} prompts, lr {config.optimizer.lr:g}."
    )
    if plan.task is not None:
        text += (
            f" Task: chains of {plan.task.terms[0]} to {plan.task.terms[1]} terms of {plan.task.digits[0]} to"
            f" {plan.task.digits[1]} digits ({plan.task.operations}), a model of {plan.task.model.layers} layers of"
            f" {plan.task.model.hidden}, warmed up from nothing, one a seed."
        )
    file = plan.folder / "time.json"
    if file.is_file():
        spent = json.loads(file.read_text())
        text += f" All of it took {spent['seconds'] / 60:.1f} minutes, {spent['parallel']} runs side by side."
    return text


# -- tables ----------------------------------------------------------------------------------------


def show(found: Interval | None, form: str) -> str:
    """Such as "0.512 (0.498 to 0.526)"."""
    if found is None:
        return "-"
    text = format(found.mean, form)
    return text if found.low is None else f"{text} ({format(found.low, form)} to {format(found.high, form)})"


def _measured(claim: Claim) -> str:
    if claim.missing:
        return f"no run of {', '.join(claim.missing)}"
    return "\n".join(_part(part) for part in claim.parts)


def _part(part: Part) -> str:
    scale, form, unit = {
        "points": (100, "+.1f", " points"),
        "percent": (100, ".1f", " %"),
        "times": (1, ".2f", " times"),
    }[part.unit]
    found = part.interval
    if found is None:
        return f"{part.label}: {part.note or 'not measured'}"
    scaled = Interval(*(None if v is None else v * scale for v in (found.mean, found.low, found.high)), found.n)
    limit = f"; limit {part.limit * scale:g}{unit}" if part.limit else ""
    return f"{part.label}: {show(scaled, form)}{unit}, n = {found.n}{limit}"


def _methods_table(runs: Sequence[Run]) -> Table:
    methods = list(dict.fromkeys(run.method for run in runs))
    rows = [["runs", *(str(sum(run.method == method for run in runs)) for method in methods)]]

    def row(title: str, form: str, figure: Callable[[Run], float | None]) -> list[str]:
        values = judged.per_seed(runs, figure)
        return [title, *(show(mean_interval(list(values.get(method, {}).values())), form) for method in methods)]

    rows += [row(title, form, figure) for _, title, form, figure in FIGURES]
    for against in ("responses", "seconds"):
        ends = [curve[-1][0] for run in runs if (curve := run.curve(against=against))]
        if ends:
            least = min(ends)
            rows.append(
                row(
                    f"accuracy after {least:,.0f} {against}",
                    ".3f",
                    lambda run, a=against, x=least: interpolate(run.curve(against=a), x),
                )
            )
    return Table(["", *methods], rows)


def _objectives_table(plan: Plan) -> Table:
    objectives = plan.objectives()
    names = [name for name in next(iter(objectives.values())) if len({str(o[name]) for o in objectives.values()}) > 1]
    return Table(["", *objectives], [[name, *(str(o[name]) for o in objectives.values())] for name in names])


# -- numbers ---------------------------------------------------------------------------------------


def _figures(run: Run) -> dict:
    return {"method": run.method, "seed": run.seed} | {name: figure(run) for name, _, _, figure in FIGURES}


def _steps(run: Run) -> Iterable[dict]:
    for number, row in enumerate(run.steps, start=1):
        sums = {"responses_so_far": run.responses[number], "seconds_so_far": run.seconds[number]}
        yield (
            {"method": run.method, "seed": run.seed, "step": row["step"]} | sums | {n: row.get(n) for n in STEP_COLUMNS}
        )


def _evaluations(run: Run) -> Iterable[dict]:
    for step, row in sorted(run.evaluations.items()):
        place = {"responses_so_far": run.responses[step], "seconds_so_far": run.seconds[step]}
        values = {name: row.get(name) for name in ("eval_accuracy", "eval_greedy", "eval_response_length")}
        yield {"method": run.method, "seed": run.seed, "step": step} | place | values


def _write_csv(file: Path, rows: Iterable[dict]) -> None:
    work = file.with_name(file.name + ".part")
    with work.open("w", newline="", encoding="utf-8") as out:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(out, row.keys())
                writer.writeheader()
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
    shutil.move(work, file)


def _first(points: Sequence[tuple[float, float]]) -> float | None:
    return points[0][1] if points else None


def _last_tenth(run: Run) -> int:
    return len(run.steps) - max(1, len(run.steps) // 10)
