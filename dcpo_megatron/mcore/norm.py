"""An RMS norm that allows sequence parallelism.

Megatron-Core's PyTorch norm refuses ``sequence_parallel``. With sequence parallelism each tensor-parallel rank
normalises its own slice of the sequence, so the weight's gradient is a partial sum; Megatron-Core adds it up over the
tensor-parallel group for every parameter whose ``sequence_parallel`` attribute is true (``finalize_model_grads``).
Setting the attribute is all that is missing. The norms on query and key heads are added up by name there, with sequence
parallelism or without.
"""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm over the last dimension, in the constructor form that Megatron-Core's layer specs call."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
