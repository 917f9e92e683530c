from dataclasses import FrozenInstanceError, fields, replace

import pytest

from dcpo_megatron.objectives import PRESETS, Objective, get_preset


def differences(a, b):
    return {field.name for field in fields(Objective) if getattr(a, field.name) != getattr(b, field.name)}


def test_the_default_objective_is_dcpo_as_in_the_paper():
    assert Objective() == get_preset("dcpo-paper")
    paper = get_preset("dcpo-paper")
    assert (paper.bounds, paper.eps_low, paper.eps_high, paper.ratio_max, paper.cap_negative) == (
        "dac",
        0.16,
        0.20,
        10,
        10,
    )
    assert (paper.advantage, paper.std_ddof, paper.aggregation, paper.kl_coef) == ("sas", 0, "otm", 0.0)
    assert not paper.dynamic_sampling and paper.overlong_buffer == 0 and paper.correction == "none"


def test_the_official_code_differs_from_the_paper_in_exactly_the_listed_topics():
    code, paper = get_preset("dcpo-official-code"), get_preset("dcpo-paper")
    assert differences(code, paper) == {"eps_low", "eps_high", "advantage", "std_ddof", "aggregation"}
    assert (code.eps_low, code.eps_high, code.advantage, code.std_ddof, code.aggregation) == (
        0.20,
        0.28,
        "group",
        1,
        "tlm",
    )
    assert (code.cap_negative, code.ratio_max) == (10.0, 10.0)


def test_the_baselines_are_the_papers():
    grpo, dapo, gspo = (get_preset(name) for name in ("grpo", "dapo", "gspo"))
    assert (grpo.bounds, grpo.eps_low, grpo.eps_high, grpo.cap_negative) == ("fixed", 0.2, 0.2, None)
    assert (grpo.aggregation, grpo.advantage, grpo.kl_coef) == ("slm", "group", 0.0)
    assert differences(dapo, grpo) == {"eps_high", "cap_negative", "aggregation", "dynamic_sampling", "overlong_buffer"}
    assert (dapo.eps_high, dapo.cap_negative, dapo.aggregation) == (0.28, 10.0, "tlm")
    assert dapo.dynamic_sampling and dapo.overlong_buffer == 512
    assert differences(gspo, grpo) == {"eps_low", "eps_high", "ratio_level"}
    assert (gspo.eps_low, gspo.eps_high, gspo.ratio_level) == (3e-4, 4e-4, "sequence")
    assert differences(get_preset("dr-grpo"), grpo) == {"aggregation", "advantage"}


def test_each_ablation_replaces_one_component_of_grpo_and_all_three_together_are_dcpo():
    grpo, paper = get_preset("grpo"), get_preset("dcpo-paper")
    parts = {
        "dac-only": {"bounds", "eps_low", "cap_negative"},
        "sas-only": {"advantage"},
        "otm-only": {"aggregation"},
    }
    combined = grpo
    for name, changed in parts.items():
        assert differences(get_preset(name), grpo) == changed
        combined = replace(combined, **{field: getattr(get_preset(name), field) for field in changed})
    assert combined == paper


def test_an_unknown_preset_is_refused_with_the_nearest_and_all_known_names():
    with pytest.raises(ValueError, match="did you mean 'dcpo-paper'") as error:
        get_preset("dcpo_paper")
    assert all(name in str(error.value) for name in PRESETS)
    with pytest.raises(ValueError, match="unknown objective 'zzz'"):
        get_preset("zzz")


def test_an_objective_cannot_be_changed_in_place_and_can_be_a_key():
    with pytest.raises(FrozenInstanceError):
        get_preset("grpo").eps_low = 0.3
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert hash(Objective(ripo_outer=[0.5, 10.0])) == hash(Objective())


@pytest.mark.parametrize(
    "changes",
    [
        {"bounds": "dca"},
        {"out_of_bound": "clip"},
        {"ratio_level": "response"},
        {"aggregation": "mean"},
        {"advantage": "gae"},
        {"std_ddof": 2},
        {"std_ddof": True},
        {"correction": "is"},
        {"dynamic_sampling": "yes"},
        {"eps_low": -0.1},
        {"eps_high": float("nan")},
        {"eps_high": "0.2"},
        {"ratio_max": 1.0},
        {"ripo_delta": -1.0},
        {"ripo_outer": (1.5, 10.0)},
        {"ripo_outer": (0.5, 0.9)},
        {"ripo_outer": 0.5},
        {"cap_negative": 1.0},
        {"cap_negative": float("inf")},
        {"cap_positive": 0.5, "bounds": "fixed"},
        {"correction_cap": 0.0},
        {"correction_low": 6.0},
        {"kl_coef": -0.1},
        {"entropy_coef": -0.1},
        {"overlong_buffer": -1},
        {"overlong_buffer": 0.5},
        {"overlong_buffer": True},
    ],
)
def test_an_impossible_value_is_refused_with_its_field_named(changes):
    named = "correction_high" if "correction_low" in changes else next(iter(changes))
    with pytest.raises(ValueError, match=named):
        Objective(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bounds": "fixed", "eps_low": 1.1}, "eps_low"),
        ({"bounds": "dac", "cap_positive": 10.0}, "cap_positive"),
        ({"bounds": "dac", "ratio_level": "sequence"}, "ratio_level"),
        ({"bounds": "ripo", "ratio_level": "sequence"}, "ratio_level"),
        ({"out_of_bound": "cispo", "cap_negative": 10.0}, "cap_negative"),
        ({"out_of_bound": "cispo", "bounds": "fixed", "cap_negative": None, "cap_positive": 5.0}, "cap_positive"),
    ],
)
def test_a_combination_that_cannot_be_meant_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        Objective(**changes)


def test_every_other_combination_of_the_axes_can_be_made():
    for bounds in ("dac", "fixed", "ripo", "none"):
        for out_of_bound in ("zero", "cispo"):
            for advantage in ("sas", "group", "mean", "leave_one_out"):
                for aggregation in ("otm", "slm", "tlm", "dr"):
                    for correction in ("none", "tis", "mis", "icepop"):
                        Objective(
                            bounds=bounds,
                            out_of_bound=out_of_bound,
                            advantage=advantage,
                            aggregation=aggregation,
                            correction=correction,
                            cap_negative=10.0 if out_of_bound == "zero" else None,
                        )
