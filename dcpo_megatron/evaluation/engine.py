"""The engine of an evaluation: a Hugging Face folder in this process, or SGLang servers that serve the model
already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dcpo_megatron.evaluation.store import EvaluationError
from dcpo_megatron.evaluation.weights import check_weights
from dcpo_megatron.mcore.model import DTYPES
from dcpo_megatron.rollout import EmbeddedEngine, RolloutEngine
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.rollout.server_client import ServerClient


class ServedFleet(Fleet):
    """Servers with the weights that they were started with, or were given by others: their own tag is version 0, and
    any other is foreign."""

    def version_of(self, tag: str) -> int | None:
        return 0 if str(tag) == self.run_id else None


def make_evaluation_engine(
    folder: str,
    urls: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    max_batch: int = 64,
    api_key: str | None = None,
    request_timeout: float = 600.0,
    prompts: Sequence[Sequence[int]] = (),
    say: Callable[[str], None] = lambda line: None,
) -> tuple[RolloutEngine, str]:
    """The engine and what it says of its weights ("" for the embedded one, whose weights are the folder's).

    ``prompts``: token ids, on which servers are compared with the folder (:mod:`~dcpo_megatron.evaluation.weights`);
    ``say`` takes what is found.

    Raises:
        EvaluationError: no Hugging Face folder (a Megatron checkpoint is converted first), or servers that hold
            different weights, or others than the folder's.
        RolloutError: a server that does not answer.
    """
    check_model_folder(folder)
    if not urls:
        return EmbeddedEngine(folder, device=device, dtype=DTYPES[dtype], max_batch=max_batch), ""
    try:
        servers = [Server(url, api_key=api_key) for url in urls]
        facts = [server.model() for server in servers]
        held = {(str(fact["model_path"]), str(fact["weight_version"])) for fact in facts}
        if len(held) > 1:
            raise EvaluationError(f"the servers hold different weights ({sorted(held)}): give servers of one model")
        (served,) = held
        fleet = ServedFleet(servers, served[1])
    except ValueError as error:
        raise EvaluationError(f"--servers: {error}") from None
    check_weights(folder, servers, facts[0], prompts, say)
    for server in servers:
        fleet.admit(server, 0)
    return ServerClient(fleet, request_timeout=request_timeout), " ".join(served)


def check_model_folder(folder: str) -> None:
    """Raises EvaluationError where ``folder`` is not a Hugging Face folder."""
    path = Path(folder)
    if (path / "config.json").is_file():
        return
    if not path.is_dir():
        raise EvaluationError(f"{folder} does not exist: name a Hugging Face folder (config.json, weights, tokenizer)")
    if (path / ".metadata").is_file() or (path / "latest").is_file() or list(path.glob("*/.metadata")):
        raise EvaluationError(
            f"{folder} is a Megatron checkpoint: run `dcpo convert megatron-to-hf {folder} NEW_FOLDER` and evaluate"
            " NEW_FOLDER"
        )
    raise EvaluationError(f"{folder} has no config.json: name a Hugging Face folder, such as a run's model/")
