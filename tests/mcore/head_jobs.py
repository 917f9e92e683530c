"""Functions that run on the ranks of a pool."""

import torch
import torch.distributed as dist


def fused_and_recomputed(folder: str, parallel: dict, items: list, objectives: dict) -> dict:
    """Every objective through the real schedule, fused and not: ``{name: (largest relative difference of a gradient, of
    the sums, fused calls)}``."""
    from dcpo_megatron.mcore.head import response_head as head
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.verification.cases import TEMPERATURE
    from dcpo_megatron.verification.measure import _micro_batches
    from dcpo_megatron.weights.transfer import load_hf_weights

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    model = PolicyModel.create(
        read_shape(folder), layout, ModelOptions(dtype="float32"), select_platform("cpu"), rank_position(),
        temperature=TEMPERATURE, head_chunk_tokens=16,
    )  # fmt: skip
    load_hf_weights(model, folder)
    model.make_trainable(OptimizerOptions())
    plan = [list(range(0, len(items), 2)), list(range(1, len(items), 2))]
    calls = []
    real = head.loss_from_hidden
    head.loss_from_hidden = lambda *args, **settings: calls.append(0) or real(*args, **settings)
    found = {}
    try:
        for name, objective in objectives.items():
            runs = []
            for fused in ("auto", "off"):
                model.fused_head_loss = fused
                calls.clear()
                sums, maxima = model.gradients(_micro_batches(plan, items, objective), objective)
                gradients = [p.main_grad.clone() for module in model.modules for p in module.parameters()]
                runs.append((gradients, sums | maxima, len(calls)))
            (ours, our_sums, fused_calls), (theirs, their_sums, other_calls) = runs
            assert other_calls == 0
            scale = max(float(t.abs().max()) for t in theirs)
            gradient = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale
            sums = max(abs(our_sums[key] - value) / max(abs(value), 1e-3) for key, value in their_sums.items())
            found[name] = (gradient, sums, fused_calls, scale)
    finally:
        head.loss_from_hidden = real
    return found


def split_vocabulary(hidden, weight, targets, coefficients, vocab: int, chunk_tokens: int) -> dict:
    """Both heads on this rank's rows of ``weight``; ``collectives``: how many gathers each forward pass made."""
    from dcpo_megatron.mcore.head.response_head import logprobs_from_hidden, loss_from_hidden

    rows = weight.shape[0] // dist.get_world_size()
    mine = weight[dist.get_rank() * rows :][:rows]
    settings = dict(vocab=vocab, temperature=0.7, tensor_group=dist.group.WORLD, chunk_tokens=chunk_tokens)
    gathers = []
    real = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: gathers.append(0) or real(*args, **kwargs)

    def token_loss(logprobs, entropy, part):
        return (coefficients[0, part] * logprobs + coefficients[1, part] * entropy).sum()

    found = {}
    try:
        for name in ("recomputed", "fused"):
            gathers.clear()
            leaves = [t.clone().requires_grad_() for t in (hidden, mine)]
            if name == "fused":
                loss, logprobs, entropy = loss_from_hidden(*leaves, targets, token_loss, **settings)
            else:
                logprobs, entropy = logprobs_from_hidden(*leaves, targets, chunk_vocab=3, **settings)
                loss = token_loss(logprobs, entropy, slice(None))
            loss.backward()
            found[name] = dict(
                logprobs=logprobs.detach(), entropy=entropy.detach(), hidden=leaves[0].grad, weight=leaves[1].grad,
                collectives=len(gathers),
            )  # fmt: skip
    finally:
        dist.all_gather_into_tensor = real
    return found


def dense(hidden, weight, targets, vocab, temperature=1.0):
    """(logprobs, entropy) by a full log_softmax."""
    logp = (hidden @ weight[:vocab].t() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
