"""Functions that run on the ranks of a pool with Transformer Engine on the import path."""

from __future__ import annotations

import torch


def _model(hf: str, parallel: dict, transformer_engine: str, load: bool):
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.weights.transfer import load_weights

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    options = ModelOptions(dtype="float32", transformer_engine=transformer_engine)
    model = PolicyModel.create(read_shape(hf), layout, options, select_platform("cpu"), rank_position())
    if load:
        load_weights(model, hf)
    return model


def _description(model) -> dict[str, tuple]:
    """A parameter's name, as the local layers name it -> its shape and what Megatron-Core reads from its marks."""
    from dcpo_megatron.weights.megatron_names import global_name

    found = {}
    for name, parameter in model.modules[0].named_parameters():
        split, dense = getattr(parameter, "tensor_model_parallel", False), getattr(parameter, "allreduce", True)
        found[global_name(name, model.shape, 0, 0)] = (
            tuple(parameter.shape),
            # 0.16 calls an expert's columns rows, which nothing reads.
            (split, parameter.partition_dim) if split and dense else split,
            bool(getattr(parameter, "sequence_parallel", False)),
            dense,
        )
    return found


def build_both(hf: str, parallel: dict):
    """``(classes with Transformer Engine, parameters with it, parameters without it, Hugging Face tensors that come
    back)`` of this rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    from dcpo_megatron.mcore import compat
    from dcpo_megatron.weights.transfer import WeightGatherer

    plain = _description(_model(hf, parallel, "off", load=False))
    assert moe_utils.te_general_gemm is None  # the router's product, TF32 in float32
    parallel_state.destroy_model_parallel()
    model = _model(hf, parallel, "on", load=True)
    assert moe_utils.te_general_gemm is compat._GEMM_OF_TRANSFORMER_ENGINE
    classes = {cls.__module__.split(".")[0] for module in model.modules[0].modules() for cls in type(module).__mro__}
    back = {name: tensor.clone() for name, tensor in WeightGatherer(model).tensors()}
    return classes, _description(model), plain, back


def formulas() -> dict[str, float]:
    """The largest differences between the stand-in's formulas that no layout above runs and plain torch."""
    return {"grouped": _grouped(), **_rotary()}


def _grouped() -> float:
    from transformer_engine.pytorch import GroupedLinear

    torch.manual_seed(0)
    layer = GroupedLinear(3, 8, 6, bias=True, params_dtype=torch.float32, device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    sizes, x, gradient = [4, 0, 6], torch.randn(10, 8, requires_grad=True), torch.randn(10, 6)
    parameters = [getattr(layer, f"{kind}{number}") for kind in ("weight", "bias") for number in range(3)]
    y = layer(x, sizes)
    wanted = torch.cat([torch.addmm(b, r, w.T) for r, w, b in zip(x.split(sizes), parameters[:3], parameters[3:])])
    both = [(out, *torch.autograd.grad(out, (x, *parameters), gradient)) for out in (y, wanted)]
    return max(float((a - b).detach().abs().max()) for a, b in zip(*both))


def _rotary() -> dict[str, float]:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    found = {}
    angles = torch.randn(64, 1, 1, 4).repeat(1, 1, 1, 2)
    packed = torch.tensor([0, 4, 12, 24], dtype=torch.int32)
    for layout, shape in (("sbhd", (12, 2, 3, 10)), ("thd", (24, 3, 10))):
        for size, rank in ((1, 0), (2, 0), (2, 1)):
            x, gradient, both = torch.randn(shape, requires_grad=True), torch.randn(shape), []
            for fused in (True, False):
                y = apply_rotary_pos_emb(
                    x, angles, tensor_format=layout, fused=fused, cp_size=size, cp_rank=rank,
                    cu_seqlens=packed * size if layout == "thd" else None,
                )  # fmt: skip
                both.append((y, *torch.autograd.grad(y, x, gradient)))
            found[f"{layout} {rank} of {size}"] = max(float((a - b).detach().abs().max()) for a, b in zip(*both))
    return found
