"""The distributed optimizer's state as pieces of a ``fully_reshardable`` checkpoint, without bringing it together
first.

Each data-parallel rank holds a stretch of each parameter's flattened state. Megatron-Core gathers the stretches into
tensors of the parameters' shapes before it saves. A checkpoint's chunks may be any boxes, though, and a stretch of a
flattened tensor is a few of them:

    rows of a [4, 6] tensor        a . . . . .
    stretch 3 .. 17:               . . . x x x      the end of a row
                                   x x x x x x      whole rows
                                   x x x x x .      the beginning of a row

So every rank writes what it holds, no rank waits for another, and stock Megatron-Core loads the result in any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dcpo_megatron.mcore.other_layers import settings_of_any_adam

PREFIX = "optimizer.state."

# (key, global shape, offsets, numbers)
Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``(offsets, sizes)`` of boxes that make up the flat stretch ``[start, end)`` of a row-major tensor of ``shape``,
    in its order."""
    if start >= end:
        return []
    if len(shape) <= 1:
        return [((start,), (end - start,))] if shape else [((), ())]
    row, inner = math.prod(shape[1:]), shape[1:]

    def within(number: int, first: int, last: int):
        return [((number, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, first, last)]

    first, last = start // row, end // row
    if first == last:
        return within(first, start - first * row, end - first * row)
    found = []
    if start % row:
        found += within(first, start % row, row)
        first += 1
    if last > first:
        found.append(((first, *(0 for _ in inner)), (last - first, *inner)))
    if end % row:
        found += within(last, 0, end % row)
    return found


def parameter_places(model: Mapping) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Identity of each parameter -> where the model's sharded state dict (before its factories are applied) puts it."""
    return {
        id(value.data): value
        for value in nested_values(model)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory))
    }


def optimizer_pieces(
    optimizer: DistributedOptimizer, places: Mapping[int, ShardedTensor | ShardedTensorFactory]
) -> Iterator[Piece]:
    """This rank's part of the state, as views of it; what other tensor- or pipeline-parallel ranks hold too is left to
    one of them."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, owned in bucket["param_map"].items():
                    place = places[id(parameter)]
                    if any(place.replica_id[:-1]):
                        continue
                    start, end = owned["param"].start, owned["param"].end
                    for name, flat in optimizer._get_main_param_and_optimizer_states(parameter).items():
                        # Adam's step is not a tensor of the parameter's size; it travels with the settings.
                        if name != "step":
                            yield from _pieces(name, flat.detach().reshape(-1), place, parameter, start, end)


def _pieces(name: str, flat: torch.Tensor, place, parameter: torch.Tensor, start: int, end: int) -> Iterator[Piece]:
    # A factory cuts a parameter (gate and up) into tensors of their own: views of it, one after the other.
    parts = list(nested_values([place.build()])) if isinstance(place, ShardedTensorFactory) else [place]
    for part in parts:
        base = (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        lead, shape = part.prepend_axis_num, tuple(part.local_shape)
        first, last = max(start, base), min(end, base + math.prod(shape))
        at = first - start
        for offsets, sizes in boxes(shape, first - base, last - base):
            count = math.prod(sizes)
            data = flat[at : at + count].reshape(*(1 for _ in range(lead)), *sizes)
            at += count
            place_of = part.global_offset
            spread = tuple(o + n for o, n in zip(place_of[lead:], offsets, strict=True))
            yield f"{PREFIX}{name}.{part.key}", tuple(part.global_shape), (*place_of[:lead], *spread), data


def optimizer_settings(optimizer) -> dict:
    """What of the optimizer is no tensor, as Megatron-Core's loader of this format expects it."""
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    if len(parts) > 1:
        optimizer._synchronize_steps()
    found = [
        settings_of_any_adam(part.state_dict()) | {"param_state_sharding_type": "fully_reshardable"} for part in parts
    ]
    return found[0] if len(found) == 1 else dict(enumerate(found))
