"""Functions that run on the ranks of a pool: a policy trained, saved as pieces, and restored."""

from pathlib import Path

import torch
import torch.distributed as dist


def _policy(
    hf: str, parallel: dict, optimizer: str, dtype: str, load: bool, transformer_engine: str = "off", **numbers
):
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.weights.transfer import load_weights

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    options = ModelOptions(dtype=dtype, transformer_engine=transformer_engine)
    policy = PolicyModel.create(read_shape(hf), layout, options, select_platform("cpu"), rank_position())
    if load:
        load_weights(policy, hf)
    else:
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.data.fill_(float("nan"))
    policy.make_trainable(OptimizerOptions(**{"lr": 1e-2, "name": optimizer} | numbers))
    return policy


def _steps(policy, numbers) -> list[float]:
    from dcpo_megatron.mcore.batch import TrainingSample
    from dcpo_megatron.objectives import get_preset

    old = torch.full((3,), -2.0)
    # The same eight responses in any layout, dealt to the data-parallel ranks.
    rank, size = policy.position.data_rank, policy.position.data_size
    norms = []
    for step in numbers:
        mine = [
            TrainingSample(n, [1, 2 + step], [3, 4 + n, 5], 1.0, 0.1, old, old) for n in range(8) if n % size == rank
        ]
        half = len(mine) // 2
        norms.append(policy.update([mine[:half], mine[half:]], get_preset("dcpo-paper"), 1e-2).gradient_norm)
    return norms


def _weights(policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for module in policy.modules for parameter in module.parameters()]


def train_and_save(hf: str, parallel: dict, folder: str, optimizer: str, dtype: str, steps: int = 2, **layers):
    """Steps (two by default), a checkpoint, three steps: gradient norms of the three and this rank's weights after
    them."""
    policy = _policy(hf, parallel, optimizer, dtype, load=True, **layers)
    _steps(policy, range(steps))
    written = _save(policy, folder)
    return _steps(policy, range(steps, steps + 3)), _weights(policy), written


def _save(policy, folder: str) -> int:
    """Writes a checkpoint; returns the bytes of this rank's part."""
    from dcpo_megatron.checkpoint.snapshot import take_snapshot
    from dcpo_megatron.weights.torch_dist_writing import write_index, write_records

    snapshot = take_snapshot(policy)
    _same_from_the_host(policy, snapshot)
    target = Path(folder)
    target.mkdir(exist_ok=True, parents=True)
    pieces = [(p.key, p.offsets, p.data) for p in snapshot.tensors] + [(k, None, b) for k, b in snapshot.objects]
    records = write_records(target / f"__{dist.get_rank()}_0.distcp", pieces)
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (records, {p.key: (p.shape, p.data.dtype) for p in snapshot.tensors}))
    if dist.get_rank() == 0:
        tensors = {key: entry for _, table in gathered for key, entry in table.items()}
        write_index(target, tensors, [record for found, _ in gathered for record in found], snapshot.common)
    dist.barrier()
    policy.offload.to_device()
    return snapshot.bytes


def _same_from_the_host(policy, snapshot) -> None:
    """Optimizer and gradients leave, and what a checkpoint takes meanwhile is what it took before. The policy is left
    without them."""
    from dcpo_megatron.checkpoint.snapshot import take_snapshot
    from dcpo_megatron.mcore.offload import OptimizerOffload

    offload = OptimizerOffload(policy)
    before = {id(tensor): tensor.untyped_storage().data_ptr() for tensor in offload._tensors()}
    policy.offload = offload  # comes back before the next step
    offload.to_host()
    assert all(tensor.untyped_storage().data_ptr() != before[id(tensor)] for tensor in offload._tensors())
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    assert buffers and all(buffer.grad_data.untyped_storage().size() == 0 for buffer in buffers)
    away = take_snapshot(policy)
    assert [(p.key, p.offsets) for p in away.tensors] == [(p.key, p.offsets) for p in snapshot.tensors]
    assert all(torch.equal(a.data, b.data) for a, b in zip(away.tensors, snapshot.tensors, strict=True))


def restore_and_train(
    hf: str, parallel: dict, folder: str, optimizer: str, dtype: str, steps: int = 2, again: str | None = None, **layers
):
    """The checkpoint (saved once more in the folder ``again``), three steps."""
    from dcpo_megatron.checkpoint.snapshot import restore

    policy = _policy(hf, parallel, optimizer, dtype, load=False, **layers)
    restore(policy, folder)
    if again:
        _save(policy, again)
    return _steps(policy, range(steps, steps + 3)), _weights(policy)


def settings_after_restoring(hf: str, parallel: dict, folder: str, optimizer: str, **numbers) -> list[dict]:
    """The groups' settings of a policy with other ``numbers`` than the checkpoint's run had, and the step of its
    Adam."""
    from dcpo_megatron.checkpoint.snapshot import restore

    policy = _policy(hf, parallel, optimizer, "float32", load=False, **numbers)
    restore(policy, folder)
    step = {float(state["step"]) for part in _inner(policy) for state in part.state.values() if "step" in state}
    return [
        {k: v for k, v in group.items() if k != "params"} | {"steps": step} for group in policy.optimizer.param_groups
    ]


def _inner(policy) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]


def nan_in_each_buffer(hf: str, parallel: dict) -> dict[str, bool]:
    """Whether gradients count as finite with a NaN in one buffer of the last rank, by buffer."""
    policy = _policy(hf, parallel, "adam", "float32", load=True)
    (chunk,) = policy.chunks
    named = {f"dense {n}": b for n, b in enumerate(chunk.buffers)}
    named |= {f"expert {n}": b for n, b in enumerate(chunk.expert_parallel_buffers)}
    for buffer in named.values():
        buffer.grad_data.zero_()
    found = {"none": policy._gradients_are_finite()}
    for name, buffer in named.items():
        if dist.get_rank() == dist.get_world_size() - 1:
            buffer.grad_data[-1] = float("nan")
        found[name] = policy._gradients_are_finite()
        buffer.grad_data.zero_()
    return found


def reduce_known_results(hf: str):
    """Two results a rank, of 1 and 2 on the first, 11 and 12 on the second."""
    from dcpo_megatron.mcore.loss import MAX_NAMES, SUM_NAMES

    policy = _policy(hf, {}, "adam", "float32", load=True)
    values = [10.0 * dist.get_rank() + n for n in (1, 2)]
    names = {"sums": SUM_NAMES, "maxima": MAX_NAMES}
    return policy._reduce(
        [{key: torch.full((len(of),), value, dtype=torch.float64) for key, of in names.items()} for value in values]
    )
