"""Do the servers of an evaluation hold the weights of the folder that is evaluated? They tell a path and a tag, and no
more.

    never given weights (`dcpo serve` has it say so), and its path holds the folder's files    -> yes
    otherwise: a few prompts' log-probs, the folder's model in this process beside each server -> they agree, or refused
    no room for the model here, or servers that round more (quantized ones)                    -> said, not refused

Weights that differ by less than rounding pass for the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dcpo_megatron.evaluation.store import EvaluationError
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.rollout.serving import UNPUBLISHED
from dcpo_megatron.weights.publish.weight_checks import TOLERANCES, logprob_difference

_PROMPTS, _TOKENS = 4, 64


def check_weights(
    folder: str | Path,
    servers: Sequence[Server],
    held: Mapping[str, object],
    prompts: Sequence[Sequence[int]],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Compares the weights of ``folder`` with those of ``servers``.

    Args:
        held: what all of them say of their model (``/model_info``).
        prompts: token ids; the first few are used.
        say: takes a line where the answer is not plain yes.

    Raises:
        EvaluationError: they hold other weights.
        ServerError: a server that does not answer.
    """
    path, tag = Path(str(held["model_path"])), str(held["weight_version"])
    if tag == UNPUBLISHED and (mine := _files(Path(folder))) is not None and _files(path) == mine:
        return
    theirs = f"weights {tag!r} of servers started from {path}"
    info = servers[0].get("/server_info")
    dtype = "float32" if info.get("dtype") == "float32" else "bfloat16"
    size, room = _bytes(Path(folder)), _available()
    if size > room:
        say(
            f"{theirs} are not compared with {folder}: its model needs {size / 1e9:.0f} GB here, and {room / 1e9:.0f} "
            "are free"
        )
        return
    sequences = [list(prompt[:_TOKENS]) for prompt in prompts if len(prompt) > 1][:_PROMPTS]
    wanted = _logprobs(folder, sequences, getattr(torch, dtype))
    difference = max(logprob_difference(server, sequences, wanted, server.timeout) for server in servers)
    what = f"{theirs} give log-probs that differ from those of {folder} by {difference:.2g} on average"
    if difference <= TOLERANCES[dtype]:
        say(f"{what}: they are taken for the same weights")
    elif info.get("quantization"):
        say(f"{what}; they are quantized ({info['quantization']}), and are taken at their word")
    else:
        raise EvaluationError(
            f"{what}, above {TOLERANCES[dtype]:g}: start servers of {folder} (dcpo serve {folder}), or evaluate the"
            " folder whose weights they hold"
        )


def _files(folder: Path) -> str | None:
    """A fingerprint of the weight files: names, sizes, both ends. None where there are none to be seen."""
    files = sorted(file for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}"))
    digest = hashlib.sha256()
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}/{size}/".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(1 << 20))
                handle.seek(max(0, size - (1 << 20)))
                digest.update(handle.read())
    except OSError:
        return None
    return digest.hexdigest() if files else None


def _bytes(folder: Path) -> int:
    """What the model takes in this process, at most: twice its files (float32 of bfloat16)."""
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


@torch.no_grad()
def _logprobs(folder: str | Path, sequences: list[list[int]], dtype: torch.dtype) -> list[list[float]]:
    """Of each sequence, the log-probs of its tokens from the second on. On the CPU: the servers have the GPUs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    found = []
    for ids in sequences:
        tokens = torch.tensor([ids])
        rows = model(tokens).logits[0, :-1].float().log_softmax(-1)
        found.append(rows.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return found
