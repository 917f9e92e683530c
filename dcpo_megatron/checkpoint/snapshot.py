"""Model and optimizer of a running job as pieces of a Megatron ``torch_dist`` checkpoint, and back.

Megatron-Core's own sharded state dicts say which part of which global tensor each rank holds; the optimizer's come in
the ``fully_reshardable`` format, where every state has its parameter's shape, so a checkpoint of one layout can be
resumed in another. :func:`take_snapshot` copies what this rank must write to the host, which is all that training waits
for; writing the copies is somebody else's work. :func:`restore` is stock ``dist_checkpointing.load``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dcpo_megatron.checkpoint.optimizer_shards import optimizer_pieces, optimizer_settings, parameter_places
from dcpo_megatron.mcore import compat  # noqa: F401 - settles what differs between versions
from dcpo_megatron.mcore.other_layers import ask_as_saved, configure_anew, settings_of_any_adam
from dcpo_megatron.mcore.step import PolicyModel

# `chained_optim_avoid_prefix`: dense and expert parameters have optimizers of their own; their states are told apart by
# their parameters' names.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class SnapshotTensor:
    """A chunk of a global tensor: ``key``, its global ``shape``, the chunk's ``offsets`` in it, and a copy of its
    numbers on the host."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor


@dataclass
class Snapshot:
    """What one rank writes: ``tensors``, ``objects`` (key, serialized), and ``common``, the same plain values on every
    rank."""

    tensors: list[SnapshotTensor]
    objects: list[tuple[str, bytes]]
    common: dict

    @property
    def bytes(self) -> int:
        return sum(piece.data.numel() * piece.data.itemsize for piece in self.tensors)


class HostMemory:
    """Memory on the host that snapshots are copied into, kept from one snapshot to the next.

    New memory has to be given and zeroed by the system page by page, which takes five times as long as the copying
    itself; training waits for both.

    From a GPU (``device``) tensors go to pinned memory, one after the other without a stop: :meth:`wait` before
    anything is read. PyTorch gives pinned memory in powers of two of bytes, so it may be up to twice what the tensors
    need; where the system has none left, memory is plain, and copies are slow and right.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._kept: list[torch.Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """All of it is free again: what was copied into it before will be overwritten."""
        self._used = 0

    def copy(self, data: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``data`` on the host, whole after :meth:`wait`.

        Fast where snapshots ask for the same shapes in the same order.
        """
        if self._used == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[self._used]
        if kept.shape != data.shape or kept.dtype != data.dtype:
            self._kept[self._used] = kept = torch.empty(0)  # the old one goes before the new one comes
            kept = self._kept[self._used] = self._new(data)
        self._used += 1
        return kept.copy_(data.detach(), non_blocking=self._device is not None)

    def _new(self, data: torch.Tensor) -> torch.Tensor:
        if self._device is not None:
            try:
                return torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=True)
            except RuntimeError:
                pass
        return torch.empty(data.shape, dtype=data.dtype, device="cpu")

    def wait(self) -> None:
        """Returns when all copies are whole."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).synchronize()


def _sharded_model(policy: PolicyModel) -> dict:
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(policy.modules)}


def _sharded(policy: PolicyModel, is_loading: bool) -> dict:
    model = _sharded_model(policy)
    state = dict(model)
    if _has_state(policy.optimizer):
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(METADATA))
    return state


def _parts(optimizer) -> list:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _has_state(optimizer) -> bool:
    """Whether there is anything beyond the weights: plain SGD in fp32 has nothing."""
    return not all(
        part.config.optimizer == "sgd" and part.config.params_dtype == torch.float32 for part in _parts(optimizer)
    )


def take_snapshot(policy: PolicyModel, memory: HostMemory | None = None) -> Snapshot:
    """Copies this rank's part of weights and optimizer to the host.

    A tensor that several data-parallel ranks hold is in the snapshot of one of them; they share the work by size.
    ``memory``: where to copy; the snapshot that was taken into it before must have been written.
    """
    memory = memory or HostMemory(policy.platform.device)
    memory.reset()
    policy.finish_gathering()
    _prepare(policy.optimizer)
    tensors, objects = [], []
    if all(isinstance(part, DistributedOptimizer) for part in _parts(policy.optimizer)):
        state = _sharded_model(policy)
        places = parameter_places(state)
        for part in _parts(policy.optimizer):
            for key, shape, offsets, data in optimizer_pieces(part, places):
                tensors.append(SnapshotTensor(key, shape, offsets, memory.copy(data)))
        state["optimizer"] = optimizer_settings(policy.optimizer)
    else:
        state = _sharded(policy, is_loading=False)
    sharded, common = save_preprocess(state, False)
    values = list(nested_values(sharded))
    mine = _share(value for value in values if isinstance(value, ShardedTensor))
    for value in values:
        if isinstance(value, ShardedObject) and is_main_replica(value.replica_id):
            buffer = io.BytesIO()
            torch.save([value.data], buffer)
            objects.append((value.unique_key, buffer.getvalue()))
        elif id(value) in mine:
            data = memory.copy(value.data).reshape(*(1 for _ in range(value.prepend_axis_num)), *value.local_shape)
            tensors.append(SnapshotTensor(value.key, tuple(value.global_shape), tuple(value.global_offset), data))
    memory.wait()
    return Snapshot(tensors, objects, common)


def _share(tensors: Iterable[ShardedTensor]) -> set[int]:
    """Identities of the tensors that this rank writes.

    The last number of a replica id is the rank in the (expert-)data-parallel group, whose ranks hold the same tensors
    in the same order: the largest tensor first, each goes to the rank that has the least so far.
    """
    mine: set[int] = set()
    groups: dict[bool, list[ShardedTensor]] = {False: [], True: []}
    for tensor in tensors:
        if not any(tensor.replica_id[:-1]):
            groups[".experts." in tensor.key].append(tensor)
    for expert, members in groups.items():
        group = (
            mpu.get_expert_data_parallel_group() if expert else mpu.get_data_parallel_group(with_context_parallel=True)
        )
        loads = [0] * dist.get_world_size(group)
        for tensor in sorted(members, key=lambda t: -t.data.numel()):
            writer = loads.index(min(loads))
            loads[writer] += tensor.data.numel() * tensor.data.itemsize
            if tensor.replica_id[-1] == writer:
                mine.add(id(tensor))
    return mine


def restore(policy: PolicyModel, folder: str | os.PathLike) -> None:
    """Loads weights and optimizer from a checkpoint of any layout, saved with Transformer Engine or without.
    Collective.

    Raises:
        megatron.core.dist_checkpointing.core.CheckpointingException, KeyError: the checkpoint lacks a tensor, or holds
            another shape.
    """
    _prepare(policy.optimizer)
    loaded = dist_checkpointing.load(ask_as_saved(_sharded(policy, is_loading=True), folder), str(folder))
    for number, chunk in enumerate(policy.modules):
        chunk.load_state_dict(loaded[f"model{number}"])
    if "optimizer" in loaded:
        parts = _parts(policy.optimizer)
        for number, part in enumerate(parts):
            settings = loaded["optimizer"] if len(parts) == 1 else loaded["optimizer"][number]
            if isinstance(part, DistributedOptimizer):
                settings_of_any_adam(settings)
            configure_anew(settings, part.optimizer.param_groups)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        _own_steps(policy.optimizer)
    else:
        policy.optimizer.reload_model_params()


def _prepare(optimizer) -> None:
    """Every Adam makes its state in its first step, but a checkpoint holds it from the start; PyTorch's has the step in
    it. Plain SGD has none."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if part.config.optimizer == "sgd":
            part.init_state_fn = lambda *_: None
            inner.state.clear()  # momentum buffers of zeros, which fused kernels ask for
            continue
        part.init_state_fn(inner, part.config)
        if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            for state in inner.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _own_steps(optimizer) -> None:
    """Megatron-Core gives all parameters of PyTorch's Adam one and the same step tensor, which each of them would then
    count up."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
