"""Megatron checkpoint -> the same for another layout: a unit a layer, and one for what is outside the layers."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from dcpo_megatron import __version__
from dcpo_megatron.mcore.hf_config import ModelShape, read_shape
from dcpo_megatron.mcore.layout import ParallelLayout, padded_vocab
from dcpo_megatron.weights.conversion import (
    check_layout,
    chunk_grid,
    hf_folder_of,
    padded_rows,
    write_index_with_companions,
)
from dcpo_megatron.weights.conversion_jobs import WorkUnit, file_facts
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.mapping import Rule, parameter_names, rule_for
from dcpo_megatron.weights.megatron_names import MegatronTensors
from dcpo_megatron.weights.torch_dist import COMMON_FILE, Record, TorchDistFolder
from dcpo_megatron.weights.torch_dist_writing import write_records

# optimizer.state.exp_avg.KEY, as Megatron-Core's model-space formats name it; several optimizers (dense, experts) are
# chained.
_OPTIMIZER_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.[^.]+\.(.+)$")


@dataclass(frozen=True)
class Reshard:
    """Cuts a Megatron checkpoint for another layout. Model and optimizer state (model-space formats) are cut alike;
    everything else is carried over.

    Raises (when made):
        ModelConfigError, CheckpointError, LayoutError: the checkpoint cannot be used, its optimizer state is tied to
            its layout, or the layout does not fit.
    """

    source: str
    layout: ParallelLayout
    config_from: str | None = None

    def __post_init__(self):
        check_layout(self.layout, self.shape)
        tied = sorted(
            key for key in [*self._folder.tensors, *self._folder.objects] if "optimizer.distributed.dp_group_idx" in key
        )
        if tied:
            raise CheckpointError(
                f"{self.source}: its optimizer state ({tied[0]}, ...) is stored as the buffers of the layout that wrote"
                " it (dp_reshardable): load it in that layout and save it as fully_reshardable"
            )
        _ = self._plan

    def __getstate__(self):
        return {"source": self.source, "layout": self.layout, "config_from": self.config_from}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @cached_property
    def _hf(self) -> Path:
        return hf_folder_of(self.source, self.config_from)

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self._hf)

    @cached_property
    def _folder(self) -> TorchDistFolder:
        return TorchDistFolder(self.source)

    @cached_property
    def _rules(self) -> dict[str, tuple[Rule, int]]:
        """Checkpoint key of each of the model's tensors -> its rule and the number of its leading (stacked)
        dimensions."""
        tensors = MegatronTensors(self._folder, self.shape)
        found = {}
        for name in parameter_names(self.shape):
            rule = rule_for(name, self.shape)
            places = tensors.places(name)
            for place in places:
                # Gate and up apart are two plain columns.
                found[place.key] = (
                    rule if len(places) == 1 else Rule("column", rule.hf_names[:1], rule.sizes[:1], rule.expert),
                    len(place.lead),
                )
        return found

    def _rule_of(self, key: str) -> tuple[Rule, int] | None:
        state = _OPTIMIZER_STATE.match(key)
        return self._rules.get(state[1] if state else key)

    @cached_property
    def _plan(self) -> list[tuple[str, list[tuple[str, int | None]]]]:
        """Units as (title, [(key, index of the first leading dimension or None)]): what belongs to one layer, and last
        what belongs to none."""
        groups: dict[int, list[tuple[str, int | None]]] = {layer: [] for layer in range(self.shape.layers + 1)}
        for key, entry in self._folder.tensors.items():
            known = self._rule_of(key)
            layer = re.search(r"decoder\.layers\.(\d+)\.", key)
            if known is not None and known[1] and layer is None:
                for index in range(entry.shape[0]):
                    groups[index].append((key, index))
            else:
                groups[int(layer[1]) if layer else self.shape.layers].append((key, None))
        return [
            ("outside the layers" if layer == self.shape.layers else f"layer {layer}", members)
            for layer, members in groups.items()
        ]

    def _shape(self, key: str) -> tuple[int, ...]:
        entry, known = self._folder.tensors[key], self._rule_of(key)
        if known is None or not known[0].vocab:
            return entry.shape
        return (padded_vocab(self.shape.vocab, self.layout.tensor), *entry.shape[1:])

    def identity(self) -> dict:
        folder = self._folder.folder
        return {
            "job": "reshard",
            "version": __version__,
            "source": str(folder.resolve()),
            "files": file_facts([*folder.glob("*.distcp"), folder / ".metadata", self._hf / "config.json"]),
            "layout": asdict(self.layout),
        }

    def units(self) -> list[WorkUnit]:
        def size(key: str, index: int | None) -> int:
            shape = self._shape(key)
            return math.prod(shape if index is None else shape[1:]) * self._folder.tensors[key].dtype.itemsize

        return [WorkUnit(title, sum(size(*member) for member in members)) for title, members in self._plan]

    def run(self, number: int, folder: Path, progress: Callable[[int], None]) -> list[Record]:
        return write_records(folder / f"__{number}_0.distcp", self._pieces(number), progress)

    def _pieces(self, number: int):
        for key, index in self._plan[number][1]:
            known, entry = self._rule_of(key), self._folder.tensors[key]
            if known is None:
                for offsets, sizes in entry.chunks:
                    yield key, offsets, self._folder.read(key, offsets, sizes)
                continue
            rule, leading = known
            parts = (self.layout.expert_tensor or self.layout.tensor) if rule.expert else self.layout.tensor
            sizes = self._shape(key)[leading:]
            leads = itertools.product(*(range(n) for n in entry.shape[:leading]))
            for lead in leads:
                if index is not None and lead[0] != index:
                    continue
                for offsets, block in chunk_grid(rule, sizes, parts, entry.dtype.itemsize):
                    yield key, (*lead, *offsets), self._block(key, entry, rule, lead, offsets, block)
        if number == self.shape.layers:
            for key in self._folder.objects:
                yield key, None, self._folder.read_bytes(key)

    def _block(self, key: str, entry, rule: Rule, lead: tuple[int, ...], offsets, block) -> torch.Tensor:
        def rows(first: int, last: int) -> torch.Tensor:
            sizes = (*(1 for _ in lead), last - first, *block[1:])
            return self._folder.read(key, (*lead, first, *offsets[1:]), sizes)

        if not rule.vocab:
            return rows(offsets[0], offsets[0] + block[0])
        return padded_rows(rows, offsets[0], offsets[0] + block[0], self.shape.vocab)

    def finish(self, folder: Path, records: list[Record]) -> None:
        tensors = {key: (self._shape(key), entry.dtype) for key, entry in self._folder.tensors.items()}
        common = self._folder.folder / COMMON_FILE
        if common.is_file():
            shutil.copy2(common, folder / COMMON_FILE)
        write_index_with_companions(folder, tensors, records, None, self._hf)
