"""Hugging Face folder -> Megatron checkpoint: a unit a layer, and one for what is outside the layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from dcpo_megatron import __version__
from dcpo_megatron.mcore.hf_config import ModelShape, read_shape
from dcpo_megatron.mcore.layout import ParallelLayout, padded_vocab
from dcpo_megatron.weights.conversion import check_layout, chunk_grid, cut, padded_rows, write_index_with_companions
from dcpo_megatron.weights.conversion_jobs import WorkUnit, file_facts
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.mapping import Rule, full_shape, merge, parameter_names, rule_for
from dcpo_megatron.weights.megatron_names import layer_states, lead_shape, outer_states, stacked_places
from dcpo_megatron.weights.torch_dist import Record
from dcpo_megatron.weights.torch_dist_writing import write_records

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HfToMegatron:
    """Writes a Hugging Face folder as a Megatron checkpoint for ``layout``.

    Raises (when made):
        ModelConfigError, CheckpointError, LayoutError: the source cannot be used, or the layout does not fit it.
    """

    source: str
    layout: ParallelLayout

    def __post_init__(self):
        check_layout(self.layout, self.shape)
        check_folder(self._folder, self.shape)
        _ = self._tensors

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.source)

    @cached_property
    def _folder(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.source)

    def __getstate__(self):
        return {"source": self.source, "layout": self.layout}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @cached_property
    def _groups(self) -> list[tuple[str, list[str]]]:
        return list(_by_layer(parameter_names(self.shape), self.shape.layers))

    def identity(self) -> dict:
        return {
            "job": "hf-to-megatron",
            "version": __version__,
            "source": str(Path(self.source).resolve()),
            "files": file_facts([*self._folder.files, Path(self.source) / "config.json"]),
            "layout": asdict(self.layout),
        }

    def units(self) -> list[WorkUnit]:
        return [WorkUnit(title, sum(self._bytes(name) for name in names)) for title, names in self._groups]

    def _full(self, name: str) -> tuple[Rule, tuple[int, ...], torch.dtype]:
        rule = rule_for(name, self.shape)
        rows = padded_vocab(self.shape.vocab, self.layout.tensor)
        return rule, full_shape(rule, name, self.shape, rows), self._folder.dtype(rule.hf_names[0])

    def _bytes(self, name: str) -> int:
        _, sizes, dtype = self._full(name)
        return math.prod(sizes) * dtype.itemsize

    def run(self, number: int, folder: Path, progress: Callable[[int], None]) -> list[Record]:
        return write_records(folder / f"__{number}_0.distcp", self._pieces(number), progress)

    def _pieces(self, number: int):
        for name in self._groups[number][1]:
            rule, sizes, dtype = self._full(name)
            grid = chunk_grid(rule, sizes, self._tensor_size(rule), dtype.itemsize)
            whole = None
            if not rule.vocab:
                whole = merge(rule, [self._folder.read(hf) for hf in rule.hf_names], self.shape)

            def rows(first: int, last: int, hf: str = rule.hf_names[0]) -> torch.Tensor:
                return padded_rows(lambda a, b: self._folder.read(hf, (a, b)), first, last, self.shape.vocab)

            for place in stacked_places(name, self.shape):
                for offsets, piece in cut(rows, whole, grid):
                    ones = (1,) * len(place.lead)
                    yield place.key, (*place.lead, *offsets), piece.reshape(*ones, *piece.shape)
        for key, data in layer_states(number, self.shape) if number < self.shape.layers else outer_states():
            yield key, None, data

    def _tensor_size(self, rule: Rule) -> int:
        return (self.layout.expert_tensor or self.layout.tensor) if rule.expert else self.layout.tensor

    @cached_property
    def _tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Global shape and dtype of each tensor of the checkpoint; all layers of a kind are one."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in parameter_names(self.shape):
            rule, sizes, dtype = self._full(name)
            for place in stacked_places(name, self.shape):
                _, first = found.setdefault(place.key, ((*lead_shape(place, self.shape), *sizes), dtype))
                if first != dtype:
                    raise CheckpointError(
                        f"{self.source}: {rule.hf_names[0]} is {dtype}, the same tensor of the first layer is {first}:"
                        " save the checkpoint in one dtype"
                    )
        return found

    def finish(self, folder: Path, records: list[Record]) -> None:
        # Megatron-LM reads these two of a checkpoint that it did not write itself.
        write_index_with_companions(
            folder, self._tensors, records, {"checkpoint_version": 3.0, "iteration": 0}, self.source
        )


def _by_layer(names: list[str], layers: int) -> Iterator[tuple[str, list[str]]]:
    """``(title, names)`` of layer 0, 1, ..., and last of everything outside the layers."""
    groups: dict[int, list[str]] = {layer: [] for layer in range(layers + 1)}
    for name in names:
        match = _LAYER.match(name)
        groups[int(match[1]) if match else layers].append(name)
    for layer, members in groups.items():
        yield ("outside the layers" if layer == layers else f"layer {layer}"), members
