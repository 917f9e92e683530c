"""Functions that run on the ranks of a pool: updates with gradients and weights that travel beside the computation, or
not."""

import torch


def train(hf: str, parallel: dict, overlap: str, dtype: str = "bfloat16", **options):
    """Five updates of a model with ``options``; what is read of its weights in between, and how many buckets travel
    apart.

    ``(names of this rank's parameters, buckets, [published after 1, log-probs after 1, log-probs after 2, snapshot
    after 2, log-probs after 4, published after 5])``; the third and fourth update follow each other with nothing
    between.
    """
    from dcpo_megatron.checkpoint.snapshot import take_snapshot
    from dcpo_megatron.mcore.batch import TrainingSample
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.weights.transfer import WeightGatherer, load_weights

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    policy = PolicyModel.create(
        read_shape(hf), layout, ModelOptions(dtype=dtype, **options), select_platform("cpu"), rank_position()
    )
    load_weights(policy, hf)
    # Without clipping: the norm is a sum whose order follows the buckets. With an eps beside which rounding is nothing.
    policy.make_trainable(
        OptimizerOptions(
            lr=1e-2,
            eps=1e-3,
            clip_grad=0.0,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_parameters=3000,
        )
    )
    gatherer = WeightGatherer(policy)
    old, size = torch.full((3,), -2.0), policy.position.data_size
    mine = [
        TrainingSample(n, [1, 2], [3, 4 + n, 5], 1.0, 0.1, old, old) for n in range(policy.position.data_rank, 8, size)
    ]
    batches = [mine[: len(mine) // 2], mine[len(mine) // 2 :]]

    def update():
        assert policy.update(batches, get_preset("dcpo-paper"), 1e-2).stepped

    def published():
        # By name: grouped experts lie in another order.
        tensors = {name: tensor.clone() for name, tensor in gatherer.tensors()}
        return [tensors[name] for name in sorted(tensors)]

    def logprobs():
        return list(policy.logprobs(batches).values())

    update()
    read = [published(), logprobs()]
    update()
    read.append(logprobs())
    pieces = sorted(take_snapshot(policy).tensors, key=lambda piece: (piece.key, piece.offsets))
    read.append([piece.data.clone() for piece in pieces if "optim" not in piece.key])
    update()
    update()
    read.append(logprobs())
    update()
    read.append(published())
    names = [name for module in policy.modules for name, _ in module.named_parameters()]
    return names, sum(len(group.buckets) for chunk in policy.chunks for group in chunk.bucket_groups), read
