"""A layout's name says all of it; one that cannot be is refused before a rank is started."""

import pytest

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.objectives import get_preset
from dcpo_megatron.verification.cases import KINDS, OBJECTIVES, find_objectives
from dcpo_megatron.verification.layouts import FAST, NAMES, Layout, find_layouts, parse_layout


def test_every_listed_layout_can_be_and_needs_at_most_eight_ranks():
    layouts = find_layouts("all")
    assert [layout.name for layout in layouts] == NAMES and len(set(NAMES)) == len(NAMES)
    assert max(layout.world for layout in layouts) == 8
    assert set(FAST) <= set(NAMES)


def test_the_list_holds_every_product_of_the_dense_dimensions_on_eight_ranks():
    missing = []
    for tensor in ("", "tp2-", "tp2-sp-"):
        for pipeline in ("", "pp2-", "pp2-vpp2-"):
            for context in ("", "cp2-"):
                for data in ("", "dp2-"):
                    name = (tensor + pipeline + context + data).rstrip("-") or "dp1"
                    if parse_layout(name).world <= 8 and name not in NAMES:
                        missing.append(name)
    assert not missing


def test_the_list_holds_every_family():
    models = {layout.model for layout in find_layouts("all")}
    assert {KINDS.get(model, (model,))[0] for model in models} == set(FAMILIES)


def test_a_layout_that_is_not_in_the_list_is_read():
    assert parse_layout("tp2-sp-cp2-ep4-etp1/m4/moe/padded") == Layout(
        "tp2-sp-cp2-ep4-etp1/m4/moe/padded",
        world=4,
        parallel={"tensor": 2, "sequence_parallel": True, "context": 2, "expert": 4, "expert_tensor": 1},
        packed=False,
        model="moe",
        micro_batches=4,
    )
    assert [layout.name for layout in find_layouts("dp3, pp4/llama,dp3")] == ["dp3", "pp4/llama"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' says nothing"),
        ("xp2", "'xp2' says nothing"),
        ("tp", "'tp' says nothing"),
        ("tp0", "'tp0' says nothing"),
        ("tp2-tp2", "'tp2' says nothing"),
        ("dp2/qwen9", "/qwen9 is none of"),
        ("tp3", "does not divide the model's 4 attention heads"),
        ("pp2-vpp4", "does not divide the model's 4 layers"),
        ("sp", "needs parallel.tensor of at least 2"),
        ("ep2", "has no experts"),
        ("pp2-vpp2/m3", "3 micro-batches are not a multiple of the 2 pipeline stages"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_reason(name, message):
    with pytest.raises(ValueError) as caught:
        find_layouts(f"dp2,{name}")
    assert message in str(caught.value) and repr(name) in str(caught.value)


def test_objectives_are_the_named_ones_or_any_preset_with_switches():
    assert find_objectives("all") == OBJECTIVES
    assert find_objectives("grpo")["grpo"] == get_preset("grpo")
    both = find_objectives("gspo+entropy+mis, dr-grpo")
    assert list(both) == ["gspo+entropy+mis", "dr-grpo"]
    chosen = both["gspo+entropy+mis"]
    assert (chosen.ratio_level, chosen.entropy_coef, chosen.correction) == ("sequence", 0.05, "mis")
    for name in ("grp", "grpo+what", "", "+kl"):
        with pytest.raises(ValueError, match="unknown objective"):
            find_objectives(name)
