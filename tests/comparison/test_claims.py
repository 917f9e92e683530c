"""Verdicts on runs whose truth is known: what is so is reproduced, what is not so is not, and noise decides nothing."""

import random

import pytest

from dcpo_megatron.comparison.claims import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, UNDECIDED, Part, judge_claims, rur
from dcpo_megatron.comparison.statistics import paired_difference
from tests.comparison.synthetic import METHODS, PAPER, make


def verdicts(runs) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in judge_claims(runs)}


def one(runs, words: str) -> str:
    (found,) = [verdict for text, verdict in verdicts(runs).items() if words in text]
    return found


def test_a_world_as_the_paper_says_reproduces_every_claim():
    found = verdicts(make())
    assert len(found) == 12
    assert set(found.values()) == {REPRODUCED}, found


def test_a_world_where_methods_do_not_differ_reproduces_no_claim_and_noise_alone_is_undecided():
    same = dict.fromkeys(METHODS, PAPER["grpo"])
    found = verdicts(make(same, noise=0.05))
    assert REPRODUCED not in found.values()
    assert found["DCPO ends with a better model than GRPO, DAPO and GSPO (held-out accuracy at equal updates)"] in (
        UNDECIDED,
        NOT_REPRODUCED,
    )
    # What the paper puts at a factor is refuted: the ratio is 1 and known well.
    for words in (
        "at most a third",
        "at least five times",
        "at least 3 times",
        "twice the time",
        "11 %",
        "at least 20 points",
    ):
        assert one(make(same, noise=0.05), words) == NOT_REPRODUCED, words


def test_false_alarms_are_as_rare_as_the_confidence_says():
    # Two equal methods: a verdict other than undecided once in twenty times, half of them "reproduced".
    draw = random.Random(2)
    verdicts = []
    for _ in range(2000):
        a, b = ({seed: draw.gauss(0.5, 0.03) for seed in range(5)} for _ in range(2))
        verdicts.append(Part("", paired_difference(a, b), 0.0, "points").verdict)
    assert verdicts.count(REPRODUCED) / 2000 == pytest.approx(0.025, abs=0.011)
    assert verdicts.count(UNDECIDED) / 2000 == pytest.approx(0.95, abs=0.016)


def test_a_worse_dcpo_is_said_to_be_worse():
    worse = PAPER | {"dcpo-paper": (0.50, 0.30, 0.05, 4)}
    for words in ("better model", "uses more", "at most a third", "All three", "fewer responses", "at least 3 times"):
        assert one(make(worse), words) == NOT_REPRODUCED, words


def test_a_small_difference_in_much_noise_is_undecided():
    values = PAPER | {"dcpo-paper": (0.68, 0.72, 0.001, 1)}
    assert one(make(values, noise=0.08), "better model") == UNDECIDED


def test_one_part_that_fails_is_enough_to_fail_the_claim():
    values = PAPER | {"otm-only": (0.50, 0.44, 0.01, 1)}
    assert one(make(values), "Each component") == NOT_REPRODUCED


def test_one_seed_decides_nothing():
    assert set(verdicts(make(seeds=1)).values()) == {UNDECIDED}


def test_claims_on_methods_without_runs_are_not_measured():
    runs = [run for run in make() if run.method != "dapo"]
    found = verdicts(runs)
    assert one(runs, "Each component") == REPRODUCED
    assert [found[text] for text in found if "DAPO" in text] == [NOT_MEASURED] * 7


def test_a_tcr_of_zero_gives_no_ratio_and_no_verdict():
    values = PAPER | {"dcpo-paper": (0.75, 0.72, 0.0, 1)}
    assert one(make(values), "at most a third") == UNDECIDED


def test_rur_leaves_the_first_visits_out_whatever_the_steps_that_took():
    for run in make(noise=0.0):
        assert rur(run) == pytest.approx(PAPER[run.method][1])
