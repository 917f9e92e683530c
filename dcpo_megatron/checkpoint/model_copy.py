"""The model of a run as a Hugging Face folder: copies on the way, and the trained one at the end. Collective: all ranks
walk, the first writes.

A copy that cannot be written (a full disk) costs no training and no rank its life: the walk goes to its end, and every
rank learns of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dcpo_megatron.checkpoint.folder import checkpoint_name, complete_steps
from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.weights.hf_writing import write_hf_folder


class UnsavedModelError(RuntimeError):
    """The trained model could not be written; the message says where its weights are."""


def write_copy(
    tensors: Iterator[tuple[str, torch.Tensor]], target: Path, hf_folder: Path, warn: Callable[[str], None]
) -> str | None:
    """Writes ``tensors`` (rank 0's; every rank walks) to ``target`` with configuration and tokenizer of ``hf_folder``.

    Returns, on every rank, None or why there is no new copy. ``warn`` is told what of an earlier one cannot be removed.
    """
    problem = ""
    if dist.get_rank() == 0:
        try:
            write_hf_folder(target, tensors, hf_folder, warn=warn)
        except OSError as error:
            problem = f"the model could not be written to {target}: {error.strerror or error}"
    # To the end also where the writer has given up: the other ranks wait for it in every tensor.
    for _ in tensors:
        pass
    return _said_by_the_first(problem) or None


def holder(checkpoints: Path, steps: int) -> str:
    """Half a sentence, the same on every rank: which checkpoint holds the weights of a run that has done all its
    ``steps``, and what to do."""
    words = ""
    if dist.get_rank() == 0:
        step = max(complete_steps(checkpoints), default=None)
        if step is None:
            words = "there is no checkpoint either: free space and start the same command again, it begins anew"
        else:
            holds = "everything" if step == steps else f"the run up to step {step}"
            words = (
                f"{checkpoints / checkpoint_name(step)} holds {holds}: free space and start the same command again, it"
                " goes on from there"
            )
    return _said_by_the_first(words)


def _said_by_the_first(words: str) -> str:
    first, *_ = all_gather_on_host(words.encode())
    return first.decode()
