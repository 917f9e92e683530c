"""Ways to break one factor on purpose. Each is called on every rank before the model is built and returns what undoes
it."""

import dataclasses
import time


def _replace(module, name, value):
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)


def without_num_microbatches():
    from dcpo_megatron.mcore import step

    real = step.make_loss
    return _replace(step, "make_loss", lambda *a, num_microbatches, **k: real(*a, num_microbatches=1, **k))


def dp_cp_for_dp():
    import torch.distributed as dist

    from dcpo_megatron.mcore import step

    real = step.make_loss

    def wrong(*args, data_parallel_size, context_group, **kwargs):
        size = data_parallel_size * dist.get_world_size(context_group)
        return real(*args, data_parallel_size=size, context_group=context_group, **kwargs)

    return _replace(step, "make_loss", wrong)


def length_of_the_local_slice():
    from dcpo_megatron.mcore import step

    real = step.make_loss

    def wrong(batch, *args, **kwargs):
        # |o| counted on this context-parallel rank: the weight 1 / (P |o|) becomes 1 / (P |o local|).
        local = batch.response_lengths.new_zeros(len(batch.response_lengths)).index_add(
            0, batch.response, batch.response.new_ones(len(batch.response))
        )
        share = batch.response_lengths[batch.response] / local[batch.response]
        return real(dataclasses.replace(batch, weights=batch.weights * share), *args, **kwargs)

    return _replace(step, "make_loss", wrong)


def without_loss_mask():
    import numpy as np

    from dcpo_megatron.mcore import batch

    real = np.flatnonzero

    def one_more(mask):
        # The position before the first response token's own is taken in too: a prompt token is trained on.
        found = real(mask)
        return np.concatenate([found[:-1], found[-1:] - 1]) if len(found) > 1 else found

    class Numpy:
        def __getattr__(self, name):
            return one_more if name == "flatnonzero" else getattr(np, name)

    return _replace(batch, "np", Numpy())


def without_vocabulary_padding():
    from dcpo_megatron.mcore.head import response_head as head

    real = head.make_settings
    return _replace(head, "make_settings", lambda *a, vocab, **k: real(*a, vocab=10**9, **k))


def contiguous_instead_of_zigzag():
    import numpy as np

    from dcpo_megatron.mcore import batch

    def contiguous(sizes, begin, context_size, context_rank):
        part = sizes // context_size
        owner = np.repeat(np.arange(len(sizes)), part)
        step = np.arange(len(owner)) - (np.cumsum(part) - part)[owner]
        return begin[owner] + context_rank * part[owner] + step

    return _replace(batch, "_zigzag", contiguous)


def batched_communication_with_vpp():
    from dcpo_megatron.mcore import model

    real = model.transformer_config

    def wrong(shape, layout, options, platform):
        return real(shape, layout, dataclasses.replace(options, overlap_p2p=False), platform)

    return _replace(model, "transformer_config", wrong)


def local_sequence_ratio():
    from dcpo_megatron.mcore import step

    real = step.make_loss
    return _replace(step, "make_loss", lambda *a, context_group, **k: real(*a, context_group=None, **k))


def norms_not_marked_sequence_parallel():
    import torch

    from dcpo_megatron.mcore import model

    class Unmarked(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size, eps=1e-5, **_):
            super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)

    return _replace(model, "RMSNorm", Unmarked)


def attention_across_sequences():
    from dcpo_megatron.mcore import batch

    real = batch.AttentionPlan

    def joined(lengths, *args):
        return real([sum(lengths)], *args)

    return _replace(batch, "AttentionPlan", joined)


def nothing_but_a_look_at_fp32_products():
    """Breaks nothing: raises where a GPU would compute fp32 products in TF32."""
    import torch

    if torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError("fp32 products are not in fp32")
    return lambda: None


def raise_on_rank_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise RuntimeError("on purpose")
    dist.barrier()


def hang_on_rank_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(1000)


def end_on_rank_one():
    import os

    import torch.distributed as dist

    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()
