"""Bytes of what a rank keeps from forward to backward, and of what comes and goes beside it. Pure formulas of model,
layout and the tokens of a micro-batch.

Per token and layer, in elements of w bytes unless said otherwise. Widths on one rank: H hidden, Q = heads x head_dim /
tp, K = key-value heads x head_dim / tp, F = ffn / tp, f = expert_ffn / etp, k = experts a token, E experts, D head_dim.
With sequence parallelism the rows marked * have 1 / tp of the tokens; context parallelism divides all tokens before
anything else.

                                       Transformer Engine      local layers, GPU       local layers, CPU
    *  norm before attention and MLP   2 x (H, 4 bytes)        the same                2 x (8 H + 4 bytes)
    *  input of q, k, v and of fc1     2 H                     2 H                     2 H
       norms of q and k, if any        Q, 4 bytes a head       2 Q + 2 K, the same     8 (Q + K) bytes from bf16,
                                                                                       12 (Q + K) from fp32, the same
       rotary cos and sin, of q and k  4 D                     4 D                     4 D
       attention: q, k, v, result      3 Q + 3 K               2 Q + 2 k'              2 Q + 2 k'
       log-sum-exp                     4 bytes a head          the same                the same
       input of the output projection  the result itself       Q                       Q
       MLP                             5 F: fc1 2 F, silu F, up F, product F (the input of fc2)
    *  router, permutation             20 k + 5 E bytes
    *  routed tokens, k of each        H + 6 f, 4 bytes; times etp where experts are cut

A norm on a CPU keeps its input and its result in fp32.
k' = K, or Q where keys and values are repeated for their kernels (float32), or (cp + 1/2) Q under context parallelism,
whose masks are not counted. Transformer Engine keeps v as a part of the whole q-k-v row, so that row stays: Q + 2 K,
with q and k after rotation and the result. Megatron-LM's own formula (``theoretical_memory_usage.py``, s b h (18 + 4
F/H) for bf16) differs: dropout masks, which are not here, all tensors divided by tp, ungrouped attention of width H, an
activation function that keeps its input and its result, where the unfused silu-and-product keeps 5 F.

With ``recompute=full`` a layer keeps its input alone, * H, and one layer at a time has the table's row again. Beside
the layers: token ids 8 bytes, the final norm, rows of indices (32 bytes, local layers), and the head
(:func:`head_bytes`). Local layers pad attention blocks of unequal length to each other: up to 35 % of the score area,
not in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcpo_megatron.mcore.head.chunks import BLOCK_BYTES, COPY_BYTES, FUSED_BLOCK_BYTES, vocab_chunk
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.mcore.layout import ParallelLayout, padded_vocab
from dcpo_megatron.memory.states import BYTES


@dataclass(frozen=True)
class Compute:
    """What is computed with and where: the switches of the table above.

    Attributes:
        dtype: float32 or bfloat16.
        layers: "transformer-engine" or "local".
        device: "cuda" or "cpu".
        recompute: none or full.
        fused_head: gradients formed in the head's forward pass.
        chunk_tokens: ``model.head_chunk_tokens``.
        busiest_experts: routed tokens of the busiest expert-parallel rank over the mean.
    """

    dtype: str
    layers: str
    device: str = "cuda"
    recompute: str = "none"
    fused_head: bool = False
    chunk_tokens: int = 1024
    busiest_experts: float = 1.0

    @property
    def width(self) -> int:
        return BYTES[self.dtype]


@dataclass(frozen=True)
class _Widths:
    """Elements of a token on one rank (see the module's table), and the share of the tokens that a * row has."""

    q: int
    k: int
    f: int
    heads: int
    kv_heads: int
    split: int


def _widths(shape: ModelShape, layout: ParallelLayout) -> _Widths:
    heads, kv_heads = shape.heads // layout.tensor, shape.kv_heads // layout.tensor
    ffn = shape.expert_ffn // (layout.expert_tensor or layout.tensor) if shape.experts else shape.ffn // layout.tensor
    split = layout.tensor if layout.sequence_parallel else 1
    return _Widths(heads * shape.head_dim, kv_heads * shape.head_dim, ffn, heads, kv_heads, split)


def layer_bytes(shape: ModelShape, layout: ParallelLayout, compute: Compute, tokens: int) -> int:
    """Kept by one layer for its backward pass, without recomputation, by the module's table. ``tokens``: of a
    micro-batch on one context-parallel rank.
    """
    own, w = _widths(shape, layout), compute.width
    split = tokens / own.split
    total = split * 2 * (_norm_bytes(shape.hidden, 1, compute) + w * shape.hidden)
    if shape.qk_norm:
        total += tokens * (_qk_norm_bytes(own, compute) + 4 * (own.heads + own.kv_heads))
    total += tokens * 4 * (w * shape.head_dim + own.heads)
    if compute.layers == "transformer-engine":
        total += tokens * w * (3 * own.q + 3 * own.k)
    else:
        # The two zigzag blocks of a sequence see (context + 1/2) times as many keys as the rank has tokens.
        keys = own.k if compute.dtype == "bfloat16" and layout.context == 1 else own.q
        total += tokens * w * (3 * own.q + 2 * keys * (layout.context + 0.5 if layout.context > 1 else 1))
    if not shape.experts:
        return round(total + tokens * 5 * own.f * w)
    per_token = shape.experts_per_token
    total += split * (20 * per_token + 5 * shape.experts)
    return round(total + _routed_tokens(shape, layout, compute, split) * (w * (shape.hidden + 6 * own.f) + 4))


def _norm_bytes(width: int, norms: int, compute: Compute) -> int:
    """Of a norm's input: a GPU's kernel keeps it and 1 / rms, PyTorch on a CPU keeps it and its result in fp32."""
    return (8 if compute.device == "cpu" else compute.width) * width + 4 * norms


def _qk_norm_bytes(own: _Widths, compute: Compute) -> int:
    """Bytes of a token: the norm's input is a copy of q and, for k, a part of the whole q-k-v row (which Transformer
    Engine's attention has counted already).
    """
    results = 4 * (own.q + own.k) if compute.device == "cpu" else 0
    if compute.device == "cpu" and compute.dtype == "bfloat16":
        return results + 4 * (own.q + own.k)
    row = 0 if compute.layers == "transformer-engine" else own.q + 2 * own.k
    return results + compute.width * (own.q + row)


def _routed_tokens(shape: ModelShape, layout: ParallelLayout, compute: Compute, tokens: float) -> float:
    """Tokens that the experts of one rank get from ``tokens`` of each: the mean, times how much the busiest has more.
    Expert-tensor ranks get each other's too.
    """
    return tokens * shape.experts_per_token * (layout.expert_tensor or layout.tensor) * compute.busiest_experts


def chunk_passes(layout: ParallelLayout, stage: int, micro_batches: int | None = None) -> int:
    """Forward passes of model chunks whose backward pass is to come, at most, on a rank of pipeline ``stage``.

    One after the other 1; Megatron-Core's 1F1B schedule ``pipeline - stage``; interleaved, ``(pipeline - stage - 1) x 2
    + (virtual - 1) x pipeline`` passes warm up and one more is made before the first backward pass. Never more than
    there are (``micro_batches``; None: enough).
    """
    if layout.pipeline == 1:
        return 1
    if not layout.interleaved:
        most = layout.pipeline - stage
        return most if micro_batches is None else min(most, micro_batches)
    chunks = layout.virtual_pipeline or 1
    most = (layout.pipeline - stage - 1) * 2 + (chunks - 1) * layout.pipeline + 1
    return most if micro_batches is None else min(most, micro_batches * chunks)


def kept_bytes(
    shape: ModelShape,
    layout: ParallelLayout,
    compute: Compute,
    tokens: int,
    stage: int,
    micro_batches: int | None = None,
) -> int:
    """Activations of a rank of ``stage`` when they are at their most: its layers' share of every pass under way,
    without the head. ``tokens`` as above.
    """
    layers = [len(chunk) for chunk in layout.stage_layers(shape.layers)[stage]]
    own = _widths(shape, layout)
    if compute.recompute == "full":
        one = compute.width * shape.hidden * tokens // own.split
        # The angles of rotation, fp32, are an input of each layer too: one tensor.
        beside = 4 * shape.head_dim * tokens
    else:
        one, beside = layer_bytes(shape, layout, compute, tokens), 0
    if compute.layers == "local":
        beside += 32 * tokens
    if stage == 0:
        beside += 8 * tokens
    return chunk_passes(layout, stage, micro_batches) * (layers[0] * one + beside)


def final_bytes(shape: ModelShape, layout: ParallelLayout, compute: Compute, tokens: int, response_tokens: int) -> int:
    """Kept on the last stage beyond its layers until the head's backward pass: the final norm, the head's inputs, and
    what the loss keeps of n response tokens.

    The recomputing head: n (H w + 24) bytes (hidden states, targets, log-sum-exp, entropy, places). The fused one: the
    gradients themselves, n H w and 4 V H / tp. The loss: some 21 bytes a response token.
    """
    own, hidden = _widths(shape, layout), shape.hidden
    norm = _norm_bytes(hidden, 1, compute) * tokens // own.split
    head = response_tokens * compute.width * hidden
    if compute.fused_head:
        return norm + head + 8 * response_tokens + 4 * _vocab_rows(shape, layout) * hidden
    return norm + head + 45 * response_tokens


def head_bytes(shape: ModelShape, layout: ParallelLayout, compute: Compute, response_tokens: int) -> int:
    """What the head needs beyond :func:`final_bytes` while it works: the larger of its forward and backward pass, as
    the table of :mod:`dcpo_megatron.mcore.head.response_head` has it, and the gradients that it returns (n H w, and V H
    w where the fused head has not counted them).

    ``response_tokens``: n, whose hidden states every tensor-parallel rank has in whole. With sequence parallelism all
    tokens are gathered first, once each way.
    """
    n, w, hidden, rows = response_tokens, compute.width, shape.hidden, _vocab_rows(shape, layout)
    on_gpu, bf16 = compute.device == "cuda", w == 2
    pieces = 0 if on_gpu else 4 * 2**20
    gathered = 0 if _widths(shape, layout).split == 1 else n * hidden * w
    if compute.fused_head:
        block = FUSED_BLOCK_BYTES[compute.device]
        chunk = max(1, min(compute.chunk_tokens, block // (4 * rows)))
        block = min(block, 4 * chunk * rows)
        forward = block + pieces + 4 * chunk * hidden + ((block // 2 if on_gpu else 0) + COPY_BYTES if bf16 else 0)
        return gathered + 8 * n + max(forward, w * rows * hidden if bf16 else 0)
    block = BLOCK_BYTES[compute.device]
    chunk_vocab = min(rows, vocab_chunk(block, compute.chunk_tokens))
    forward = block + pieces + 32 * n
    backward = block + pieces + w * (n + rows) * hidden
    if bf16:
        backward += 4 * n * hidden + (4 if on_gpu else 8) * chunk_vocab * hidden + (block // 2 if on_gpu else 0)
    return gathered + 8 * n + max(forward, backward)


def working_bytes(shape: ModelShape, layout: ParallelLayout, compute: Compute, tokens: int) -> int:
    """What one layer's backward pass needs beside what is kept: gradients of its widest part (as wide as what it kept:
    5 F, or H + 6 f of each routed token), of its output and its input, both gathered over tensor-parallel ranks, and of
    fc1's weight in w bytes before it is added up; with recomputation, the layer anew.

    Not held against anything: what a kernel allocates is its own matter.
    """
    own, w, hidden = _widths(shape, layout), compute.width, shape.hidden
    if shape.experts:
        wide = _routed_tokens(shape, layout, compute, tokens / own.split) * (2 * hidden + 6 * own.f)
    else:
        wide = tokens * 5 * own.f
    again = layer_bytes(shape, layout, compute, tokens) if compute.recompute == "full" else 0
    return round(w * (wide + 2 * tokens * hidden + 2 * own.f * hidden)) + again


def _vocab_rows(shape: ModelShape, layout: ParallelLayout) -> int:
    return padded_vocab(shape.vocab, layout.tensor) // layout.tensor
