"""Rotary angles of a packed row, taken by position once a micro-batch.

    a table by place in a sequence    0  w  2w  3w  4w           Megatron-Core's own: each layer cuts it apart and lays
    positions of the row's tokens     0  1  2  0  1  2  3  0     it out again, sequence by sequence
    their angles                      0  w  2w 0  w  2w 3w 0     here: one outer product, the row turned at once

The number of operators of a layer then does not depend on how many sequences a row holds, and a context-parallel rank's
zigzag order is in its positions already. Transformer Engine's layers keep the table: their kernel reads it by sequence
itself.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from dcpo_megatron.mcore.attention import PackedRow


class PositionRotary(RotaryEmbedding):
    """Megatron-Core's rotary embedding; for a packed row with ``positions``, the angles of its tokens, ``[T, 1, 1,
    head_dim]``."""

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, config, packed_seq_params=None, **others
    ):
        """What the model hands to :meth:`forward`: the row's positions where it has them, else the longest sequence."""
        if isinstance(packed_seq_params, PackedRow) and packed_seq_params.positions is not None:
            return packed_seq_params.positions
        return super().get_rotary_seq_len(
            inference_context, transformer, transformer_input, config, packed_seq_params, **others
        )

    def forward(self, length: int | torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not isinstance(length, torch.Tensor):
            return super().forward(length, *args, **kwargs)
        angles = torch.outer(length.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None]
