"""The claims of the DCPO paper (arXiv 2509.02333), each held against the runs: reproduced, not reproduced, or undecided
at this number of seeds.

A claim has one or more parts, each an interval over seeds and a limit:

    reproduced      the whole interval is beyond the limit, on the claimed side
    not reproduced  the whole interval is on the other side
    undecided       the limit lies within it, or there is no interval (one seed)

A claim of several parts is reproduced where all are, and not reproduced where one is not. Asking for all parts at the
same confidence needs no correction for their number; the claims among each other are not corrected either, so one in
twenty may be off by chance.

The paper gives single numbers of single runs. Where it says "about ten times" or "3 to 5 times" the limit is stated
beside the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dcpo_megatron.comparison.runs import Run, reached
from dcpo_megatron.comparison.statistics import Interval, mean_interval, paired_difference, paired_ratio

REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_MEASURED = "reproduced", "not reproduced", "undecided", "not measured"

GRPO, DAPO, GSPO, DCPO = "grpo", "dapo", "gspo", "dcpo-paper"
SINGLE = ("dac-only", "sas-only", "otm-only")

Values = Mapping[int, float]


@dataclass(frozen=True)
class Part:
    """One comparison: ``label`` says of what; ``unit`` how to show it: "points" and "percent" are hundredths, "times" a
    plain factor; ``note`` says why there is no interval."""

    label: str
    interval: Interval | None
    limit: float
    unit: str
    note: str = ""

    @property
    def verdict(self) -> str:
        found = self.interval
        if found is None or found.low is None or found.high is None:
            return UNDECIDED
        if found.low > self.limit:
            return REPRODUCED
        return NOT_REPRODUCED if found.high <= self.limit else UNDECIDED


@dataclass(frozen=True)
class Claim:
    """``text``: what is claimed; ``paper``: the paper's own figures."""

    text: str
    paper: str
    parts: tuple[Part, ...]
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.missing:
            return NOT_MEASURED
        verdicts = {part.verdict for part in self.parts}
        if NOT_REPRODUCED in verdicts:
            return NOT_REPRODUCED
        return UNDECIDED if UNDECIDED in verdicts else REPRODUCED


def per_seed(runs: Sequence[Run], figure: Callable[[Run], float | None]) -> dict[str, dict[int, float]]:
    """A figure of every run that has it: method -> seed -> value."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        value = figure(run)
        if value is not None:
            found.setdefault(run.method, {})[run.seed] = value
    return found


def rur(run: Run) -> float | None:
    """Response utilisation ratio, mean over the steps after the first visit of every prompt."""
    return run.mean("response_utilization_ratio", run.first_visits)


def tcr(run: Run) -> float | None:
    """Token clipping ratio, mean over all steps."""
    return run.mean("token_clipping_ratio")


def responses_per_update(run: Run) -> float | None:
    """Responses generated for one optimizer update."""
    updates = run.total("updates")
    return run.responses[-1] / updates if updates else None


def seconds_per_update(run: Run) -> float | None:
    """Seconds of training for one optimizer update."""
    updates = run.total("updates")
    return run.seconds[-1] / updates if updates else None


def responses_per_point(run: Run) -> float | None:
    """Responses generated for one point (hundredth) of held-out accuracy gained; None where nothing was gained."""
    gain = run.gain()
    return run.responses[-1] / (100 * gain) if gain is not None and gain > 0 else None


def judge_claims(runs: Sequence[Run]) -> list[Claim]:
    """Every claim, in the order of the paper. Claims on methods that have no run are there too, as not measured."""
    have = {run.method for run in runs}
    clipping, used, accuracy = per_seed(runs, tcr), per_seed(runs, rur), per_seed(runs, Run.final)

    def claim(text: str, paper: str, methods: Sequence[str], parts: Callable[[], Sequence[Part]]) -> Claim:
        missing = tuple(method for method in methods if method not in have)
        return Claim(text, paper, () if missing else tuple(parts()), missing)

    def less(values: Mapping[str, Values], a: str, b: str, what: str, limit: float = 0.0) -> Part:
        return Part(f"{what}, {a} less {b}", paired_difference(values.get(a, {}), values.get(b, {})), limit, "points")

    def times(values: Mapping[str, Values], a: str, b: str, what: str, limit: float) -> Part:
        found = paired_ratio(values.get(a, {}), values.get(b, {}))
        note = "" if found else "a seed has 0, or nothing: there is no ratio"
        return Part(f"{what}, {a} over {b}", found, limit, "times", note)

    return [
        claim(
            "DCPO uses more of its responses than GRPO and GSPO (RUR after the first visit of every prompt)",
            "DCPO 71.8 %, GRPO 43.8 %, GSPO 45.6 %",
            (DCPO, GRPO, GSPO),
            lambda: [less(used, DCPO, other, "RUR") for other in (GRPO, GSPO)],
        ),
        claim(
            "DCPO's RUR is at least 20 points above GRPO's",
            "28 points",
            (DCPO, GRPO),
            lambda: [less(used, DCPO, GRPO, "RUR", 0.20)],
        ),
        claim(
            "DCPO clips fewer tokens than GRPO and DAPO (TCR): at most a third",
            "about a tenth",
            (DCPO, GRPO, DAPO),
            lambda: [times(clipping, other, DCPO, "TCR", 3.0) for other in (GRPO, DAPO)],
        ),
        claim(
            "DCPO's TCR is about ten times below GRPO's and DAPO's: at least five times",
            "about 10 times",
            (DCPO, GRPO, DAPO),
            lambda: [times(clipping, other, DCPO, "TCR", 5.0) for other in (GRPO, DAPO)],
        ),
        claim(
            "GSPO clips more than 11 % of the tokens",
            "above 11 %",
            (GSPO,),
            lambda: [Part("TCR, gspo", mean_interval(list(clipping.get(GSPO, {}).values())), 0.11, "percent")],
        ),
        claim(
            "DAPO generates 3 to 5 times the responses for equal updates: at least 3 times",
            "3 to 5 times",
            (DCPO, DAPO),
            lambda: [times(per_seed(runs, responses_per_update), DAPO, DCPO, "responses an update", 3.0)],
        ),
        claim(
            "DAPO takes at least twice the time for equal updates",
            "at least 2 times the GPU hours",
            (DCPO, DAPO),
            lambda: [times(per_seed(runs, seconds_per_update), DAPO, DCPO, "seconds an update", 2.0)],
        ),
        claim(
            "DCPO ends with a better model than GRPO, DAPO and GSPO (held-out accuracy at equal updates)",
            "Avg@32 of the 7B model: DCPO 45.2, GSPO 43.3, DAPO 42.4, GRPO 41.6",
            (DCPO, GRPO, DAPO, GSPO),
            lambda: [less(accuracy, DCPO, other, "accuracy") for other in (GRPO, DAPO, GSPO)],
        ),
        claim(
            "Below DCPO the order is GSPO, DAPO, GRPO",
            "so with the 7B model; with the 14B model DAPO is above GSPO",
            (GRPO, DAPO, GSPO),
            lambda: [less(accuracy, GSPO, DAPO, "accuracy"), less(accuracy, DAPO, GRPO, "accuracy")],
        ),
        claim(
            "Each component of DCPO alone is better than GRPO (held-out accuracy)",
            "curves only",
            (GRPO, *SINGLE),
            lambda: [less(accuracy, single, GRPO, "accuracy") for single in SINGLE],
        ),
        claim(
            "All three components together are better than each alone",
            "curves only",
            (DCPO, *SINGLE),
            lambda: [less(accuracy, DCPO, single, "accuracy") for single in SINGLE],
        ),
        claim(
            "DCPO needs fewer responses than DAPO for its accuracy",
            "no figure",
            (DCPO, DAPO),
            lambda: [
                times(per_seed(runs, responses_per_point), DAPO, DCPO, "responses a point of accuracy gained", 1.0),
                times(_responses_to_the_same(runs, DAPO, DCPO), DAPO, DCPO, "responses to the same accuracy", 1.0),
            ],
        ),
    ]


def _responses_to_the_same(runs: Sequence[Run], a: str, b: str) -> dict[str, dict[int, float]]:
    """Responses until the held-out accuracy that both methods reach, seed by seed: the lower of their two best."""
    curves = {run.seed: {} for run in runs}
    for run in runs:
        if run.method in (a, b) and len(run.curve()) > 1:
            curves[run.seed][run.method] = run.curve(against="responses")
    found: dict[str, dict[int, float]] = {a: {}, b: {}}
    for seed, pair in curves.items():
        if len(pair) == 2:
            level = min(max(y for _, y in points) for points in pair.values())
            for method, points in pair.items():
                found[method][seed] = reached(points, level)
    return found
