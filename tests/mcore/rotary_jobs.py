"""Functions that run on the ranks of a pool: one layer of attention over packed rows, its operators counted and its
values compared."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 8


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def _sequences(count: int):
    from dcpo_megatron.mcore.batch import TrainingSample

    return [TrainingSample(n, [1, 2, 3], [4 + n % 7] * (LENGTH - 3)) for n in range(count)]


def count_and_compare():
    """Two context-parallel ranks: ``({sequences: operators of a layer, forward and backward}, [(rotated as here, as by
    Megatron-Core)])``."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from dcpo_megatron.mcore.attention import PackedRow
    from dcpo_megatron.mcore.hf_config import shape_of
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.verification.cases import tiny_config

    layout = ParallelLayout(context=2)
    make_groups(layout)
    config = tiny_config("dense", num_hidden_layers=1)
    position = rank_position()
    policy = PolicyModel.create(shape_of(config), layout, ModelOptions(), select_platform("cpu"), position)
    (model,) = policy.modules
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    counts = {}
    for sequences in (2, 16):
        # As the policy itself lays rows out.
        row = policy._batch(_sequences(sequences))
        hidden = torch.randn(row.input_ids.numel(), 1, config.hidden_size, requires_grad=True)
        angles = _angles(model, hidden, row.packed)
        with Counter() as counter:
            output, _ = model.decoder.layers[0].self_attention(
                hidden, None, rotary_pos_emb=angles, packed_seq_params=row.packed
            )
            output.sum().backward()
        counts[sequences] = counter.count
    pairs = []
    for sequences in (1, 5):
        ours = policy._batch(_sequences(sequences)).packed
        megatrons = PackedRow(ours.plan, torch.device("cpu"))
        query = torch.randn(sequences * LENGTH // 2, 4, config.hidden_size // 4)
        shared = dict(config=model.config, cp_group=position.context_group)
        rotated = apply_rotary_pos_emb(query[:, None], _angles(model, query, ours), **shared)
        angles = _angles(model, query, megatrons)
        wanted = apply_rotary_pos_emb(query, angles, cu_seqlens=megatrons.cu_seqlens_q, **shared)
        pairs.append((rotated[:, 0], wanted))
    return counts, pairs


def _angles(model, hidden, packed):
    """As GPTModel asks for them."""
    length = model.rotary_pos_emb.get_rotary_seq_len(None, model.decoder, hidden, model.config, packed)
    return model.rotary_pos_emb(length, packed_seq=packed.qkv_format == "thd", cp_group=None)
