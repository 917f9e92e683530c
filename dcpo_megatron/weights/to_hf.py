"""Megatron checkpoint -> Hugging Face folder: a unit a safetensors shard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dcpo_megatron import __version__
from dcpo_megatron.mcore.hf_config import ModelShape, read_shape
from dcpo_megatron.weights.conversion import hf_folder_of, vocab_stretches
from dcpo_megatron.weights.conversion_jobs import WorkUnit, file_facts
from dcpo_megatron.weights.hf_folder import copy_companions
from dcpo_megatron.weights.hf_writing import shard_name, write_safetensors, write_weight_index
from dcpo_megatron.weights.mapping import full_shape, hf_shapes, parameter_names, rule_for, split
from dcpo_megatron.weights.megatron_names import MegatronTensors
from dcpo_megatron.weights.torch_dist import Record, TorchDistFolder


@dataclass(frozen=True)
class MegatronToHf:
    """Writes the model of a Megatron checkpoint (any dialect, any layout) as a Hugging Face folder with shards of at
    most ``shard_bytes``.

    Raises (when made):
        ModelConfigError, CheckpointError: the checkpoint cannot be used, or is of another model than config.json says.
    """

    source: str
    config_from: str | None = None
    shard_bytes: int = 5 * 1000**3

    def __post_init__(self):
        _ = self._shards

    def __getstate__(self):
        return {"source": self.source, "config_from": self.config_from, "shard_bytes": self.shard_bytes}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @cached_property
    def _hf(self) -> Path:
        return hf_folder_of(self.source, self.config_from)

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self._hf)

    @cached_property
    def _tensors(self) -> MegatronTensors:
        return MegatronTensors(TorchDistFolder(self.source), self.shape)

    @cached_property
    def _shards(self) -> list[list[str]]:
        """Parameter names of each shard: a parameter's Hugging Face tensors stay together."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in parameter_names(self.shape):
            count = self._bytes(name)
            if shards[-1] and size + count > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += count
        return shards

    def _bytes(self, name: str) -> int:
        sizes = hf_shapes(rule_for(name, self.shape), self.shape)
        return sum(math.prod(s) for s in sizes) * self._tensors.dtype(name).itemsize

    def identity(self) -> dict:
        folder = self._tensors.folder.folder
        return {
            "job": "megatron-to-hf",
            "version": __version__,
            "source": str(folder.resolve()),
            "files": file_facts([*folder.glob("*.distcp"), folder / ".metadata", self._hf / "config.json"]),
            "shard_bytes": self.shard_bytes,
        }

    def units(self) -> list[WorkUnit]:
        return [
            WorkUnit(shard_name(number, len(self._shards)), sum(self._bytes(name) for name in names))
            for number, names in enumerate(self._shards)
        ]

    def run(self, number: int, folder: Path, progress: Callable[[int], None]) -> list[Record]:
        names = self._shards[number]
        entries = []
        for name in names:
            rule, dtype = rule_for(name, self.shape), self._tensors.dtype(name)
            entries += [(hf, dtype, s) for hf, s in zip(rule.hf_names, hf_shapes(rule, self.shape), strict=True)]
        pieces = itertools.chain.from_iterable(self._pieces(name) for name in names)
        write_safetensors(folder / shard_name(number, len(self._shards)), entries, pieces, progress)
        return []

    def _pieces(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        rule = rule_for(name, self.shape)
        sizes = full_shape(rule, name, self.shape, self.shape.vocab)
        if not rule.vocab:
            yield from split(rule, self._tensors.read(name, sizes), self.shape)
            return
        row_bytes = math.prod(sizes[1:]) * self._tensors.dtype(name).itemsize
        for stretch in vocab_stretches(sizes[0], row_bytes):
            yield rule.hf_names[0], self._tensors.read(name, sizes, stretch)

    def finish(self, folder: Path, records: list[Record]) -> None:
        copy_companions(self._hf, folder)
        names = [[hf for name in shard for hf in rule_for(name, self.shape).hf_names] for shard in self._shards]
        write_weight_index(folder, names, sum(unit.bytes for unit in self.units()))
