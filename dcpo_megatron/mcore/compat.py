"""What differs between Megatron-Core versions (0.16 to 0.19), in one place."""

from __future__ import annotations

import inspect

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils

# From 0.18 a custom head is given to the model's forward call; below, the output layer is shadowed for the call (see head.py).
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters

# 0.16 asks `te_general_gemm is not None` but defines the name only where Transformer Engine imports.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None
