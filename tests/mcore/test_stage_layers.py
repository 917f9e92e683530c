"""Which layers each pipeline rank and chunk holds, against what Megatron-Core builds, for every small layout."""

import dataclasses
import itertools

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.hf_config import shape_of
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.mcore.model import ModelOptions, transformer_config
from dcpo_megatron.mcore.platform import select_platform

SHAPE = shape_of(FAMILIES["qwen2"].tiny_config())
SIZES = (None, 1, 2, 3, 4)
CASES = [
    (
        layers,
        ParallelLayout(pipeline=pipeline, virtual_pipeline=chunks, first_stage_layers=first, last_stage_layers=last),
    )
    for layers, pipeline, chunks, first, last in itertools.product((4, 6, 7, 8, 10), (2, 3, 4), (None, 2), SIZES, SIZES)
]


def problems(layers: int, layout: ParallelLayout) -> list[str]:
    return layout.problems(dataclasses.replace(SHAPE, layers=layers), layout.pipeline)


def built_by_megatron(layers: int, layout: ParallelLayout) -> list[list[range]]:
    """``[rank][chunk]`` from Megatron-Core's own functions."""
    shape = dataclasses.replace(SHAPE, layers=layers)
    config = transformer_config(shape, layout, ModelOptions(), select_platform("cpu"))
    stages = []
    for rank in range(layout.pipeline):
        stages.append([])
        for chunk in range(layout.virtual_pipeline or 1):
            vp_stage = chunk if layout.interleaved else None
            start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
            count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
            stages[-1].append(range(start, start + count))
    return stages


def test_every_layout_that_is_not_refused_has_the_layers_that_megatron_builds():
    uneven = 0
    for layers, layout in CASES:
        if not problems(layers, layout):
            stages = layout.stage_layers(layers)
            assert stages == built_by_megatron(layers, layout), (layers, layout)
            in_order = [layer for chunk in zip(*stages) for part in chunk for layer in part]
            assert in_order == list(range(layers)), (layers, layout)
            uneven += len({len(part) for stage in stages for part in stage}) > 1
    assert uneven > 40


def test_what_is_refused_megatron_refuses_too_or_builds_without_some_layers():
    refused = 0
    for layers, layout in CASES:
        if problems(layers, layout):
            refused += 1
            try:
                stages = built_by_megatron(layers, layout)
            except (ValueError, AssertionError):
                continue
            held = sorted(layer for stage in stages for part in stage for layer in part)
            whole = held == list(range(layers)) and all(len(part) for stage in stages for part in stage)
            # Of two stages only the first is told to Megatron-Core, and the second would silently take the rest.
            contradiction = layout.pipeline == 2 and None not in (layout.first_stage_layers, layout.last_stage_layers)
            assert not whole or contradiction, (layers, layout)
    assert refused > 100


def test_chunks_go_round_the_ranks():
    layout = ParallelLayout(pipeline=2, virtual_pipeline=2, first_stage_layers=2)
    assert layout.stage_layers(6) == [[range(0, 1), range(3, 4)], [range(1, 3), range(4, 6)]]
    assert ParallelLayout().stage_layers(3) == [[range(0, 3)]]


@pytest.mark.parametrize(
    ("layers", "fields", "message"),
    [
        (4, {"first_stage_layers": 1}, "parallel.first_stage_layers=1 needs parallel.pipeline of at least 2"),
        (
            4,
            {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2},
            (
                "parallel.first_stage_layers=1 and parallel.last_stage_layers=2 must add up to the model's 4 layers: "
                "parallel.pipeline=2 has no other stages"
            ),
        ),
        (
            6,
            {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 2},
            (
                "parallel.first_stage_layers=1 and parallel.last_stage_layers=2 of the model's 6 layers leave 3 for the"
                " other 2 pipeline stages: they need at least one each, and equally many"
            ),
        ),
        (
            4,
            {"pipeline": 2, "last_stage_layers": 4},
            (
                "parallel.last_stage_layers=4 of the model's 4 layers leave 0 for the other 1 pipeline stages: "
                "they need at least one each, and equally many"
            ),
        ),
        (
            6,
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 1},
            (
                "parallel.virtual_pipeline=2 does not divide the 1 and the 5 layers of a pipeline stage "
                "(parallel.first_stage_layers=1, 6 layers in all)"
            ),
        ),
        (4, {"pipeline": 2, "first_stage_layers": 0}, "parallel.first_stage_layers=0 must be at least 1"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_reason(layers, fields, message):
    assert problems(layers, ParallelLayout(**fields)) == [message]


def test_layers_of_a_layout_that_cannot_be_are_not_made_up():
    with pytest.raises(ValueError, match="does not divide the model's 7 layers"):
        ParallelLayout(pipeline=2).stage_layers(7)
