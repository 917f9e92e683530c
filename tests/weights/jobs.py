"""Functions that run on the ranks of a pool."""

import torch


def _policy(folder: str, parallel: dict):
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.weights.transfer import load_hf_weights

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    policy = PolicyModel.create(
        read_shape(folder), layout, ModelOptions(dtype="float32"), select_platform("cpu"), rank_position()
    )
    load_hf_weights(policy, folder)
    return policy


def through_megatron(folder: str, parallel: dict) -> dict[str, torch.Tensor]:
    """The folder's weights after a way through the sharded model and back, as this rank sees them."""
    from dcpo_megatron.weights.transfer import WeightGatherer

    return {name: tensor.clone() for name, tensor in WeightGatherer(_policy(folder, parallel)).tensors()}


def weights_and_parameters(folder: str, parallel: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """As :func:`through_megatron`, and the names of all ranks' parameters with global layer numbers, each once."""
    import torch.distributed as dist

    from dcpo_megatron.weights.transfer import WeightGatherer

    policy = _policy(folder, parallel)
    names = set()
    for chunk in policy.modules:
        offset = chunk.decoder.layers[0].layer_number - 1
        for name, _ in chunk.named_parameters():
            rest = name.removeprefix("decoder.layers.")
            number, _, part = rest.partition(".")
            names.add(f"decoder.layers.{int(number) + offset}.{part}" if rest != name else name)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    tensors = {name: tensor.clone() for name, tensor in WeightGatherer(policy).tensors()}
    return tensors, sorted(set().union(*everyone))


def logprobs(folder: str, parallel: dict, tokens: list[int], prompt: int) -> torch.Tensor:
    """Log-probs of the tokens after the first ``prompt`` ones, as the last pipeline stage sees them."""
    from dcpo_megatron.mcore.batch import TrainingSample

    blank = torch.zeros(len(tokens) - prompt)
    sequence = TrainingSample(0, tokens[:prompt], tokens[prompt:], 1.0, 0.1, blank, blank)
    return _policy(folder, parallel).logprobs([[sequence]])[0]


def update_with_a_bad_number(folder: str, parallel: dict) -> tuple[bool, bool, list[bool]]:
    """A good update, then one with a NaN on the last rank's response alone: (stepped, stepped, weights unchanged by the
    second)."""
    import torch.distributed as dist

    from dcpo_megatron.mcore.batch import TrainingSample
    from dcpo_megatron.mcore.model import OptimizerOptions
    from dcpo_megatron.objectives import get_preset

    policy = _policy(folder, parallel)
    policy.make_trainable(OptimizerOptions(lr=1e-3))
    old = torch.full((3,), -2.0)
    rank = dist.get_rank()

    def batch(bad: bool):
        return [
            [TrainingSample(rank, [1, 2], [3, 4, 5], 1.0, 0.1, torch.full((3,), float("nan")) if bad else old, old)]
        ]

    first = policy.update(batch(False), get_preset("dcpo-paper"), 1e-3)
    before = [p.detach().clone() for module in policy.modules for p in module.parameters()]
    second = policy.update(batch(rank == dist.get_world_size() - 1), get_preset("dcpo-paper"), 1e-3)
    after = [p for module in policy.modules for p in module.parameters()]
    return first.stepped, second.stepped, [torch.equal(a, b) for a, b in zip(before, after)]


def on_first(folder: str, parallel: dict) -> tuple[bool, int, int]:
    """Walks once for all ranks and once for the first: whether this one got what it should the second time, and the
    bytes of tensors that came from others in each walk."""
    import torch.distributed as dist

    from dcpo_megatron.weights import transfer

    usual, meet, meetings = transfer._MEETING_BYTES, transfer.all_reduce_on_host, 0
    gatherer = transfer.WeightGatherer(_policy(folder, parallel))
    received, originals = 0, (dist.all_gather, dist.broadcast, dist.recv)

    def all_gather(parts, mine, group):
        nonlocal received
        received += sum(part.nbytes for part in parts) - mine.nbytes
        return originals[0](parts, mine, group=group)

    def broadcast(tensor, source, group):
        nonlocal received
        received += tensor.nbytes * (source != dist.get_rank())
        return originals[1](tensor, source, group=group)

    def counted(values):
        nonlocal meetings
        meetings += 1
        return meet(values)

    def recv(tensor, **kwargs):
        nonlocal received
        received += tensor.nbytes
        return originals[2](tensor, **kwargs)

    dist.all_gather, dist.broadcast, dist.recv = all_gather, broadcast, recv
    transfer._MEETING_BYTES, transfer.all_reduce_on_host = 4000, counted
    try:
        everywhere = {name: tensor.clone() for name, tensor in gatherer.tensors()}
        before, received = received, 0
        first = {name: tensor.clone() for name, tensor in gatherer.on_first()}
    finally:
        dist.all_gather, dist.broadcast, dist.recv = originals
        transfer._MEETING_BYTES, transfer.all_reduce_on_host = usual, meet
    assert meetings > 2, meetings
    if dist.get_rank():
        return not first, before, received
    same = list(first) == list(everywhere) and all(torch.equal(first[name], everywhere[name]) for name in first)
    return same, before, received
