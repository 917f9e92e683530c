"""A stand-in for Transformer Engine's C extension: what its layers and its optimizer call, as plain torch formulas.

    generic_gemm, te_general_grouped_gemm       products, with bias, bias gradient and accumulation
    rmsnorm_fwd, rmsnorm_bwd                    y = x * r * w,  r = 1 / sqrt(mean(x^2) + eps)
    convert_thd_to_bshd, convert_bshd_to_thd    packed rows <-> padded rows, for the attention that Transformer Engine
                                                writes in torch ("unfused")
    fused_rope_forward, fused_rope_backward     rotary embedding
    multi_tensor_adam, _sgd, _l2norm, _scale    FusedAdam, FusedSGD, gradient norms

Fused attention is refused (:func:`get_fused_attn_backend`), so the unfused one is chosen. FP8, communication overlap
and all else raise NotImplementedError by name when they are called.
"""

from __future__ import annotations

import enum
import sys
from types import SimpleNamespace

import torch


def _enum(name: str, *members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: number for number, member in enumerate(members)})


DType = _enum(
    "DType", "kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"
)
NVTE_Fused_Attn_Backend = _enum("NVTE_Fused_Attn_Backend", "NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8")
NVTE_QKV_Format = _enum("NVTE_QKV_Format", *(f"NVTE_{name}" for name in (
    "QKV_Format_NOT_SET", "SBHD", "BSHD", "THD", "BSHD_2SBHD", "SBHD_2BSHD", "THD_2BSHD", "THD_2SBHD", "BHSD",
)))  # fmt: skip
FP8FwdTensors = _enum(
    "FP8FwdTensors",
    *(f"GEMM{number}_{what}" for number in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")),
)
FP8BwdTensors = _enum(
    "FP8BwdTensors", *(f"GRAD_{what}{number}" for number in (1, 2, 3) for what in ("OUTPUT", "INPUT"))
)
TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Numbered(type):
    """An enumeration whose members are numbered as they are asked for: what they are called is all that matters
    here."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len([member for member in vars(cls) if not member.startswith("__")]))
        return getattr(cls, name)


for _name in (
    "NVTE_QKV_Layout", "NVTE_Bias_Type", "NVTE_Mask_Type", "NVTE_Softmax_Type", "NVTEScalingMode",
    "NVTERoutingMapFormat",
    "NVTEQBHistogramMode", "CommOverlapType", "CommGemmOverlapRole", "CommOverlapAlgo",
):  # fmt: skip
    globals()[_name] = _Numbered(_name, (), {})


class FP8TensorMeta:
    pass


class CommOverlapHelper:
    pass


class CommOverlapBase:
    pass


class CommOverlap(CommOverlapBase):
    pass


class CommOverlapP2P(CommOverlapBase):
    pass


def _refused(name: str):
    def call(*args, **kwargs):
        raise NotImplementedError(
            f"transformer_engine_torch.{name} is not among the stand-in's formulas: add it to {__file__}"
        )

    return call


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return _refused(name)


def _asked_by_transformer_engine() -> bool:
    """Whether the code that asked our caller is Transformer Engine's own."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine.")


def stand_for_gpu() -> None:
    """To Transformer Engine's code there is an H100 and every tensor lies on it; everybody else goes on seeing none."""
    h100 = SimpleNamespace(name="stand-in", major=9, minor=0, multi_processor_count=132, total_memory=80 * 1024**3)
    torch.cuda.get_device_properties = lambda device=None: h100
    torch.cuda.get_device_capability = lambda device=None: (h100.major, h100.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    available, on_gpu = torch.cuda.is_available, torch.Tensor.is_cuda
    torch.cuda.is_available = lambda: _asked_by_transformer_engine() or available()
    torch.Tensor.is_cuda = property(lambda tensor: _asked_by_transformer_engine() or on_gpu.__get__(tensor))


def get_cudnn_version() -> int:
    return 91800


def get_cublasLt_version() -> int:
    return 130000


def get_num_cublas_streams() -> int:
    return 4


def get_stream_priority_range() -> tuple[int, int]:
    return 0, 0


def get_fused_attn_backend(*args, **kwargs):
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "the stand-in has none"


# -- products --------------------------------------------------------------------------------------


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _product(a, transa, b, transb) -> torch.Tensor:
    """op(b) @ op(a), the row-major reading of cuBLAS's column-major product; leading dimensions of ``b`` are rows."""
    left, right = _rows(b), _rows(a)
    return (left.T if transb else left).float() @ (right.T if transa else right).float()


def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, split,
    comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """Returns ``(out, bias gradient, None, extra_output)``. A bias is added forward; backward (``grad``) its gradient
    is the sum over rows of ``b``."""
    if quantizer is not None or gelu or comm_overlap is not None:
        raise NotImplementedError("the stand-in multiplies plain tensors: no quantizer, no fused gelu, no overlap")
    result = _product(a, transa, b, transb) * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = _rows(b).float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if not transb:
        result = result.reshape(*b.shape[:-1], result.shape[-1])
    if out is None:
        return (
            result.to(TORCH[DType(int(out_dtype))] if out_dtype is not None else b.dtype),
            bias_grad,
            None,
            extra_output,
        )
    result = result.reshape(out.shape)
    out.copy_(out.float() + result if accumulate else result)
    return out, bias_grad, None, extra_output


def te_general_grouped_gemm(
    a, transa, b, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu_out, grad, workspaces,
    workspace_size, accumulate,
    split, sm_count,
):  # fmt: skip
    """One product a group, into ``out`` (one tensor a group, or the groups' rows one after the other). Returns the bias
    gradients, filled in ``bias``."""
    outs = list(out[0].split(list(m_splits))) if single_output else out
    for left, right, into, offset in zip(a, b, outs, bias, strict=True):
        result = _product(left, transa, right, transb).reshape(into.shape)
        if grad and offset.numel():
            offset.copy_(_rows(right).float().sum(0))
        elif offset.numel():
            result = result + offset.float()
        into.copy_(into.float() + result if accumulate else result)
    return bias


# -- norms -----------------------------------------------------------------------------------------


layernorm_fwd, layernorm_bwd = (
    _refused("layernorm_fwd"),
    _refused("layernorm_bwd"),
)  # looked up beside RMSNorm's, never called


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Returns ``(y, None, r)``, r = 1 / sqrt(mean(x^2) + eps)."""
    gamma = weight.float() + 1 if zero_centered else weight.float()
    inverse = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    y = (x.float() * inverse[..., None] * gamma).to(TORCH[DType(int(dtype))])
    return (y if out is None else out.copy_(y)), None, inverse


def rmsnorm_bwd(dy, x, inverse, weight, sm_margin, zero_centered):
    """Returns ``(dx, dweight)``: dx = r (g - x^ mean(g x^)), x^ = x r, g = dy w."""
    gamma = weight.float() + 1 if zero_centered else weight.float()
    normed = x.float() * inverse[..., None]
    scaled = dy.float() * gamma
    dx = inverse[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), _rows(dy.float() * normed).sum(0).to(weight.dtype)


# -- packed rows -----------------------------------------------------------------------------------


def _token_places(cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """[tokens] places of packed tokens in rows of ``longest``."""
    lengths = cu_seqlens.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return row * longest + torch.arange(int(cu_seqlens[-1])) - cu_seqlens[row]


def convert_thd_to_bshd(packed, cu_seqlens, batch, longest):
    rows = packed.new_zeros(batch * longest, *packed.shape[1:])
    rows[_token_places(cu_seqlens, longest)] = packed[: int(cu_seqlens[-1])]
    return rows.reshape(batch, longest, *packed.shape[1:])


def convert_bshd_to_thd(rows, cu_seqlens, tokens):
    packed = rows.new_zeros(tokens, *rows.shape[2:])
    packed[: int(cu_seqlens[-1])] = rows.flatten(0, 1)[_token_places(cu_seqlens, rows.shape[1])]
    return packed


# -- rotary embedding ------------------------------------------------------------------------------


def fused_rope_forward(x, freqs, start, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    """x cos + (-x2, x1) sin for the first dimensions of ``x`` [tokens, heads, d] or [sequence, batch, heads, d]; with
    context parallelism a sequence's rows are chunks ``cp_rank`` and ``2 cp_size - 1 - cp_rank`` of it."""
    if interleaved or start is not None or layout not in (NVTE_QKV_Format.NVTE_SBHD, NVTE_QKV_Format.NVTE_THD):
        raise NotImplementedError("the stand-in rotates halves, of layouts sbhd and thd, from position 0")
    lengths = torch.tensor([len(x)]) if cu_seqlens is None else (cu_seqlens // cp_size).diff()
    positions = torch.cat([_positions(int(length), cp_size, cp_rank) for length in lengths])
    angles = freqs.float()[positions].reshape(len(positions), *(1 for _ in x.shape[1:-1]), -1)
    width = angles.shape[-1]
    first, second = x[: len(positions), ..., :width].float().chunk(2, dim=-1)
    rotated = torch.cat((first, second), -1) * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    result = x.clone(memory_format=torch.contiguous_format)
    result[: len(positions), ..., :width] = rotated.to(x.dtype)
    return result


def _positions(length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    if cp_size == 1:
        return torch.arange(length)
    half = length // 2
    return torch.cat([chunk * half + torch.arange(half) for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank)])


def fused_rope_backward(dy, freqs, *rest):
    """The rotation back: by the opposite angles."""
    return fused_rope_forward(dy, -freqs, *rest)


# -- several tensors at once -----------------------------------------------------------------------


def multi_tensor_adam(chunk, noop, tensors, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    """Adam on lists of gradients, parameters, first and second moments; ``mode`` 1 decays weights apart from the
    gradient (AdamW), 0 within it."""
    if not isinstance(step, int):
        raise TypeError(f"step is {type(step).__name__}: the extension takes an int")
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, m, v in zip(*tensors, strict=True):
        g = gradient.float() + (0 if mode else weight_decay * parameter.float())
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / first) / ((v / second).sqrt() + eps) + (weight_decay * parameter.float() if mode else 0)
        parameter.copy_(parameter.float() - lr * update)


def multi_tensor_sgd(
    chunk, noop, tensors, weight_decay, momentum, dampening, lr, nesterov, first_run, decay_last, scale
):
    if momentum or nesterov:
        raise NotImplementedError("the stand-in's SGD has no momentum")
    for gradient, parameter, _ in zip(*tensors, strict=True):
        parameter.sub_(lr * (gradient.float() * scale + weight_decay * parameter))


def multi_tensor_l2norm(chunk, noop, tensors, per_tensor=False):
    norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk, noop, tensors, scale):
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale  # the same with the scale in a tensor
