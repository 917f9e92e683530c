"""What differs between Megatron-Core versions (0.16 to 0.19), in one place."""

from __future__ import annotations

import inspect

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils

# From 0.18 a custom head is given to the model's forward call; below, the output layer is shadowed for the call (see
# head.py).
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters

# 0.16 asks `te_general_gemm is not None` but defines the name only where Transformer Engine imports.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None
_GEMM_OF_TRANSFORMER_ENGINE = moe_utils.te_general_gemm


def choose_router_product(transformer_engine: bool) -> None:
    """The router of experts takes Transformer Engine's product wherever that imports, local layers or not, and it is
    TF32 for float32: local layers are given torch's."""
    moe_utils.te_general_gemm = _GEMM_OF_TRANSFORMER_ENGINE if transformer_engine else None


def _keep_step(set_states):
    """Loading a ``fully_reshardable`` checkpoint, Megatron-Core leaves the step out of the states that it brings and
    then asks for every state that the optimizer has: PyTorch's Adam (used where neither Apex nor Transformer Engine is
    installed) has it there. The step itself is set by ``load_state_dict``."""

    def call(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    return call


DistributedOptimizer._set_main_param_and_optimizer_states = _keep_step(
    DistributedOptimizer._set_main_param_and_optimizer_states
)
