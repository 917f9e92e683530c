"""Does a checkpoint compute what its Hugging Face model computes? The same tokens through transformers and through
Megatron-Core."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.mcore.hf_config import read_shape
from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
from dcpo_megatron.mcore.model import DTYPES, ModelOptions
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.weights.transfer import load_weights


@dataclass(frozen=True)
class LogitComparison:
    """The largest absolute difference of two models' logits: where it is, and the largest logit beside it. ``agree``:
    tokens whose most likely successor is the same, as a share."""

    worst: float
    position: int
    token: int
    scale: float
    agree: float


@torch.no_grad()
def compare_logits(
    hf_folder: str | os.PathLike,
    checkpoint: str | os.PathLike,
    token_ids: Sequence[int],
    dtype: str = "float32",
    device: str = "auto",
) -> LogitComparison:
    """Runs ``token_ids`` through the transformers model of ``hf_folder`` and the Megatron-Core model loaded from
    ``checkpoint``, one after the other.

    Args:
        checkpoint: a Megatron checkpoint of any layout, or a Hugging Face folder.
        dtype: in which both compute, "float32" or "bfloat16"; the weights are cast to it.
        device: "auto", "cpu" or "cuda".

    Raises:
        ModelConfigError, CheckpointError: one of them cannot be used.
        ValueError: a token that the vocabulary does not have, or more tokens than the model has positions.
    """
    shape = read_shape(hf_folder)
    if not token_ids or max(token_ids) >= shape.vocab or min(token_ids) < 0:
        raise ValueError(f"token ids must be from 0 to {shape.vocab - 1}, and at least one")
    if len(token_ids) > shape.max_positions:
        raise ValueError(f"{len(token_ids)} tokens are more than the model's {shape.max_positions} positions")
    platform = platforms.select_platform(device)
    # Before transformers builds anything: the redirections of the CPU platform must not come in the middle.
    platforms.prepare(platform)
    ids = torch.tensor([list(token_ids)], device=platform.device)
    wanted = _transformers_logits(hf_folder, ids, DTYPES[dtype])
    found = _megatron_logits(shape, checkpoint, ids, dtype, platform)
    difference = (found - wanted).abs()
    place = int(torch.where(difference.isnan(), torch.inf, difference).argmax())
    return LogitComparison(
        worst=float(difference.reshape(-1)[place]),
        position=place // shape.vocab,
        token=place % shape.vocab,
        scale=float(wanted.abs().max()),
        agree=float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )


def _transformers_logits(folder, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(ids.device).eval()
    logits = model(ids).logits[0].float()
    del model
    gc.collect()
    return logits


def _megatron_logits(shape, checkpoint, ids: torch.Tensor, dtype: str, platform) -> torch.Tensor:
    platforms.start(platform, 600)
    make_groups(ParallelLayout())
    try:
        model = PolicyModel.create(shape, ParallelLayout(), ModelOptions(dtype=dtype), platform, rank_position())
        load_weights(model, checkpoint)
        (chunk,) = model.chunks
        chunk.eval()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return chunk(input_ids=ids, position_ids=positions, attention_mask=None)[0, :, : shape.vocab].float()
    finally:
        platforms.stop()
