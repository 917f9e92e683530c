"""Bytes of what a rank holds all the time: weights, gradients, optimizer. Pure formulas of model and layout.

With n a parameter's elements on one rank (its rows or columns divided by the tensor-parallel size, an expert's by the
expert-tensor size; the vocabulary padded first), w the bytes of a weight (2 or 4) and d the ranks that share a buffer
(data x context; for experts world / (expert x expert_tensor x pipeline)):

    buffer       N = sum of n, each rounded up to 64 elements, the whole to lcm(d, 128)
                 one for dense and one for expert parameters of a chunk
    weights      w N                                                     parameters are views into it
    gradients    4 N                                                     reduced in fp32
    Adam         (4 + 4 + 4) N / d from bf16, (4 + 4) N / d from fp32    main weights (fp32 ones are their own), moments
    SGD          4 N from bf16, nothing from fp32                        not distributed, N not rounded

The rounding is that of Megatron-Core's ``_ParamAndGradBuffer`` (with its distributed optimizer); the shares are those
of ``DistributedOptimizer``. The same as Megatron-LM's 6 + 12 / d bytes a parameter (``theoretical_memory_usage.py``),
which leaves the rounding out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.families.base import SIZES, Rule
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.mcore.layout import ParallelLayout, padded_vocab

BYTES = {"float32": 4, "bfloat16": 2}
_OUTPUT, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ChunkParameters:
    """Sizes, in elements on one rank, of every parameter of one model chunk: of dense layers, and of this rank's
    experts.
    """

    layers: int
    dense: tuple[int, ...]
    expert: tuple[int, ...]

    @property
    def elements(self) -> int:
        return sum(self.dense) + sum(self.expert)


def stage_chunks(shape: ModelShape, layout: ParallelLayout, stage: int) -> list[ChunkParameters]:
    """The model chunks of a rank of pipeline stage ``stage``: one, or ``virtual_pipeline`` of them."""
    chunks = layout.stage_layers(shape.layers)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    return [
        _chunk(shape, layout, len(layers), first and number == 0, last and number == len(chunks) - 1)
        for number, layers in enumerate(chunks)
    ]


def _chunk(shape: ModelShape, layout: ParallelLayout, layers: int, first: bool, last: bool) -> ChunkParameters:
    family = FAMILIES[shape.model_type]
    dense = [_elements(rule, shape, layout) for rule in family.layer.values() if not rule.expert] * layers
    expert = [_elements(rule, shape, layout) for rule in family.layer.values() if rule.expert]
    expert *= layers * (shape.experts // layout.expert)
    for name, rule in family.outer.items():
        # A tied output layer is the embedding itself where both are on one rank, and a copy of its own elsewhere.
        own = not shape.tied_embeddings or layout.pipeline > 1
        if first if name == _EMBEDDING else last and (name != _OUTPUT or own):
            dense.append(_elements(rule, shape, layout))
    return ChunkParameters(layers, tuple(dense), tuple(expert))


def _elements(rule: Rule, shape: ModelShape, layout: ParallelLayout) -> int:
    total = 0
    for words in rule.sizes:
        sizes = [SIZES[word](shape) for word in words]
        if rule.vocab:
            sizes[0] = padded_vocab(shape.vocab, layout.tensor)
        total += math.prod(sizes)
    if rule.kind == "plain":
        return total
    return total // ((layout.expert_tensor or layout.tensor) if rule.expert else layout.tensor)


def sharing_ranks(shape: ModelShape, layout: ParallelLayout, world_size: int) -> tuple[int, int]:
    """Ranks that share a buffer of dense parameters, and of experts' (1 without experts)."""
    dense = layout.data_parallel(world_size) * layout.context
    if not shape.experts:
        return dense, 1
    return dense, world_size // (layout.expert * (layout.expert_tensor or layout.tensor) * layout.pipeline)


def state_bytes(
    chunks: list[ChunkParameters], sharing: tuple[int, int], dtype: str, optimizer: str
) -> tuple[int, int, int]:
    """``(weights, gradients, optimizer)`` of a rank that holds ``chunks``, in bytes, by the formulas above.

    ``sharing``: :func:`sharing_ranks`. ``optimizer``: adam (distributed) or sgd.
    """
    width = BYTES[dtype]
    if optimizer == "sgd":
        elements = sum(chunk.elements for chunk in chunks)
        return width * elements, 4 * elements, 4 * elements if width == 2 else 0
    weights = gradients = states = 0
    for chunk in chunks:
        for sizes, ranks in zip((chunk.dense, chunk.expert), sharing, strict=True):
            buffer = _round_up(sum(_round_up(size, 64) for size in sizes), math.lcm(ranks, 128))
            weights += width * buffer
            gradients += 4 * buffer
            states += (12 if width == 2 else 8) * buffer // ranks
    return weights, gradients, states


def model_elements(shape: ModelShape) -> tuple[int, int]:
    """Elements of the whole model, vocabulary not padded: all of them, and those that one token meets (its experts
    alone, the embedding as a table).
    """
    family = FAMILIES[shape.model_type]
    layer = {rule.expert: 0 for rule in family.layer.values()}
    for rule in family.layer.values():
        layer[rule.expert] += sum(math.prod(SIZES[word](shape) for word in words) for words in rule.sizes)
    table, dense, expert = shape.vocab * shape.hidden, layer[False], layer.get(True, 0)
    outer = table * (1 if shape.tied_embeddings else 2) + shape.hidden
    everything = shape.layers * (dense + expert * shape.experts) + outer
    return everything, shape.layers * (dense + expert * shape.experts_per_token) + table


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
