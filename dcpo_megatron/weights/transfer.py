"""Weights between a checkpoint of either kind, or an engine, and the sharded Megatron model of a running job.

:func:`load_weights` fills this rank's chunks, each rank reading its own tensors. :class:`WeightGatherer` goes the other
way: every rank walks the same global list of parameters, one at a time,

    tensor-parallel all-gather -> expert-parallel all-gather -> broadcast from its pipeline stage -> split into Hugging
    Face tensors

so that every rank sees every full tensor once and no more than one Megatron parameter (of one layer) is held at any
moment. Where rank 0 alone wants the tensors (:meth:`WeightGatherer.on_first`), one replica of the model takes part, and
a later pipeline stage sends to rank 0 what it has gathered: nobody else receives a tensor of another stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dcpo_megatron.distributed import all_gather_bytes, all_reduce_on_host
from dcpo_megatron.mcore.layout import RankPosition
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.weights.conversion import padded_rows
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import SafetensorsFolder
from dcpo_megatron.weights.mapping import Rule, full_shape, merge, rule_for, shard, split, unshard
from dcpo_megatron.weights.megatron_names import MegatronTensors, global_name
from dcpo_megatron.weights.torch_dist import TorchDistFolder, find_checkpoint

# After so many bytes that go to rank 0 alone all ranks meet.
_MEETING_BYTES = 2**30


def local_rules(model: PolicyModel) -> list[tuple[str, torch.nn.Parameter, Rule]]:
    """``(name, parameter, rule)`` of every parameter this rank holds, chunk by chunk, in ``named_parameters`` order."""
    found = []
    expert_offset = model.position.expert_rank * (model.shape.experts // model.position.expert_size)
    for number, chunk in enumerate(model.modules):
        offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, parameter in chunk.named_parameters():
            found.append((f"chunk{number}.{name}", parameter, rule_for(name, model.shape, offset, expert_offset)))
    return found


def global_names(model: PolicyModel) -> dict[str, str]:
    """``{name as local_rules gives it: name with global layer and expert numbers, as the local layer spec has it}``."""
    found = {}
    expert_offset = model.position.expert_rank * (model.shape.experts // model.position.expert_size)
    for number, chunk in enumerate(model.modules):
        offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, _ in chunk.named_parameters():
            found[f"chunk{number}.{name}"] = global_name(name, model.shape, offset, expert_offset)
    return found


def _tensor_rank(position: RankPosition, rule: Rule) -> tuple[int, int, dist.ProcessGroup]:
    if rule.expert:
        return position.expert_tensor_rank, position.expert_tensor_size, position.expert_tensor_group
    return position.tensor_rank, position.tensor_size, position.tensor_group


def load_weights(model: PolicyModel, path) -> None:
    """Fills the model's parameters from a Hugging Face folder or a Megatron checkpoint of any layout, before
    :meth:`PolicyModel.make_trainable`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another model than ``model.shape``.
    """
    if find_checkpoint(path) is not None:
        load_megatron_weights(model, path)
    else:
        load_hf_weights(model, path)


@torch.no_grad()
def load_megatron_weights(model: PolicyModel, path) -> None:
    """Fills the model's parameters from a ``torch_dist`` checkpoint; each rank reads its own part of each tensor.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    source = MegatronTensors(TorchDistFolder(path), model.shape)
    names = global_names(model)
    for local, parameter, rule in local_rules(model):
        rank, size, _ = _tensor_rank(model.position, rule)
        parameter.copy_(_read_part(source, names[local], rule, model, rank, size, parameter.shape[0]))


def _read_part(source: MegatronTensors, name: str, rule: Rule, model: PolicyModel, rank: int, size: int, rows: int):
    sizes = full_shape(rule, name, model.shape, model.shape.vocab)
    if rule.kind in ("plain", "row"):
        return shard(rule, source.read(name, sizes), rank, size)
    if rule.kind == "gated":
        half, part = sizes[0] // 2, rows // 2
        starts = (rank * part, half + rank * part)
        return torch.cat([source.read(name, sizes, (start, start + part)) for start in starts])
    first, last = rank * rows, (rank + 1) * rows
    if rule.vocab:
        return padded_rows(lambda a, b: source.read(name, sizes, (a, b)), first, last, model.shape.vocab)
    return source.read(name, sizes, (first, last))


@torch.no_grad()
def load_hf_weights(model: PolicyModel, folder) -> None:
    """Fills the model's parameters from a Hugging Face folder, before :meth:`PolicyModel.make_trainable`.

    Raises:
        CheckpointError: as :func:`check_folder`, before any weight is read.
    """
    source = SafetensorsFolder(folder)
    check_folder(source, model.shape)
    for name, parameter, rule in local_rules(model):
        rank, size, _ = _tensor_rank(model.position, rule)
        rows = parameter.shape[0] * size if rule.vocab else None
        full = merge(rule, [source.read(hf) for hf in rule.hf_names], model.shape, rows)
        part = shard(rule, full, rank, size)
        if part.shape != parameter.shape:
            raise RuntimeError(
                f"{name} has {tuple(parameter.shape)}, its rule gives {tuple(part.shape)}: the table of "
                f"{model.shape.model_type} does not describe the model that was built"
            )
        parameter.copy_(part)


@dataclass(frozen=True)
class _Entry:
    stage: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rules: tuple[Rule, ...]  # one per expert-parallel rank


class WeightGatherer:
    """Walks the whole model as Hugging Face tensors, on every rank (:meth:`tensors`) or on rank 0 alone
    (:meth:`on_first`). The plan is made once (one exchange)."""

    def __init__(self, model: PolicyModel):
        self.model = model
        self.position = model.position
        self._local = {name: parameter for name, parameter, _ in local_rules(model)}
        self.plan = self._make_plan()

    def _make_plan(self) -> list[_Entry]:
        shape, experts = self.model.shape, self.position.expert_size
        mine = []
        for name, parameter, _ in local_rules(self.model):
            layers = self.model.modules[int(name.split(".", 1)[0].removeprefix("chunk"))].decoder.layers
            offset = layers[0].layer_number - 1 if len(layers) else 0
            mine.append([name, offset, list(parameter.shape), str(parameter.dtype).removeprefix("torch.")])
        encoded = json.dumps(mine).encode()
        entries, seen = [], set()
        for stage, payload in enumerate(
            all_gather_bytes(encoded, self.position.pipeline_group, self.model.platform.device)
        ):
            for name, offset, size, dtype in json.loads(payload):
                bare = name.split(".", 1)[1]
                # Expert-parallel peers hold the same local names for other experts: their rules are worked out, not
                # exchanged.
                ranks = experts if rule_for(bare, shape, offset).expert else 1
                rules = tuple(rule_for(bare, shape, offset, rank * (shape.experts // experts)) for rank in range(ranks))
                # With tied embeddings the first and the last stage both hold the embedding: it is sent once.
                if rules[0].hf_names in seen:
                    continue
                seen.add(rules[0].hf_names)
                entries.append(_Entry(stage, name, tuple(size), getattr(torch, dtype), rules))
        return entries

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A new walk, see :meth:`tensors`: a gatherer is an iterable that can be walked again."""
        return self.tensors()

    @torch.no_grad()
    def tensors(
        self,
        select: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``(Hugging Face name, full tensor)`` for every weight, in the same order on every rank. Every rank must walk
        to the end.

        ``select`` says what to take of each parameter (its gradient, say): a tensor of the parameter's shape, and of
        ``dtype`` (None: of the parameter's own).
        """
        position = self.position
        self.model.finish_gathering()
        for entry in self.plan:
            parts: list[torch.Tensor] | None = None
            if entry.stage == position.pipeline_rank:
                parts = self._join_here(entry, select)
            if position.pipeline_size > 1:
                parts = parts or self._room(entry, dtype)
                source = dist.get_global_rank(position.pipeline_group, entry.stage)
                parts = [part.contiguous() for part in parts]
                for part in parts:
                    dist.broadcast(part, source, group=position.pipeline_group)
            assert parts is not None  # one stage alone holds every entry
            for rule, full in zip(entry.rules, parts, strict=True):
                yield from split(rule, full, self.model.shape)

    @torch.no_grad()
    def on_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`tensors` on rank 0, and nothing on the other ranks, which must walk to the end all the same."""
        position = self.position
        self.model.finish_gathering()
        leads = position.data_rank == position.context_rank == position.tensor_rank == 0  # its stage
        since = 0
        for entry in self.plan:
            # Rank 0 may be slow to take them, and a wait for it has the deadline of one collective.
            if since >= _MEETING_BYTES:
                all_reduce_on_host(torch.zeros(1))
                since = 0
            since += len(entry.rules) * math.prod(self._full_shape(entry)) * entry.dtype.itemsize
            parts: list[torch.Tensor] | None = None
            if entry.stage == position.pipeline_rank and self._is_in_first_replica(entry):
                parts = self._join_here(entry, torch.Tensor.detach)
            if not leads:
                continue
            if entry.stage and position.pipeline_rank == entry.stage:
                assert parts is not None
                for part in parts:
                    dist.send(part.contiguous(), group=position.pipeline_group, group_dst=0)
            elif entry.stage and position.pipeline_rank == 0:
                parts = self._room(entry)
                for part in parts:
                    dist.recv(part, group=position.pipeline_group, group_src=entry.stage)
            if position.pipeline_rank == 0:
                assert parts is not None
                for rule, full in zip(entry.rules, parts, strict=True):
                    yield from split(rule, full, self.model.shape)

    def _is_in_first_replica(self, entry: _Entry) -> bool:
        if entry.rules[0].expert:
            return self.position.expert_data_rank == 0
        return self.position.data_rank == self.position.context_rank == 0

    def _room(self, entry: _Entry, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        shape, device = self._full_shape(entry), self.model.platform.device
        return [torch.empty(shape, dtype=dtype or entry.dtype, device=device) for _ in entry.rules]

    def _full_shape(self, entry: _Entry) -> tuple[int, ...]:
        rule = entry.rules[0]
        size = _tensor_rank(self.position, rule)[1]
        if rule.kind == "plain":
            return entry.shape
        dim = 1 if rule.kind == "row" else 0
        return tuple(n * size if d == dim else n for d, n in enumerate(entry.shape))

    def _join_here(self, entry: _Entry, select) -> list[torch.Tensor]:
        rule = entry.rules[0]
        parameter = select(self._local[entry.name])
        _, size, group = _tensor_rank(self.position, rule)
        if size > 1 and rule.kind != "plain":
            parts = [torch.empty_like(parameter) for _ in range(size)]
            dist.all_gather(parts, parameter.contiguous(), group=group)
            full = unshard(rule, parts)
        else:
            full = parameter
        if len(entry.rules) == 1:
            return [full]
        experts = [torch.empty_like(full) for _ in entry.rules]
        dist.all_gather(experts, full.contiguous(), group=self.position.expert_group)
        return experts
