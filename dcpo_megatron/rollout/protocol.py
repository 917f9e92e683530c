"""The seam between the trainer and whatever samples responses.

    engine.load_weights(tensors, version)     full Hugging Face tensors, one at a time; all or nothing
    engine.generate(requests, sampling)       token ids and log-probs, in the order of the requests

The embedded engine is one implementation; a client of a fleet of servers is another. An engine never re-tokenises and
never drops a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dcpo_megatron.data.response import ArrayRecord


class RolloutError(RuntimeError):
    """The engine cannot do what was asked; the message says what happened and what to do."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 keep the whole distribution.
    ``stop_token_ids`` end a response and belong to it.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative")


@dataclass(frozen=True)
class GenerateRequest:
    """One response to sample. With the same ``seed``, weights and prompt the response is the same, whichever rank
    samples it and in whatever company."""

    prompt_token_ids: tuple[int, ...]
    seed: int

    def __post_init__(self):
        if not self.prompt_token_ids:
            raise ValueError(
                "a request needs at least one prompt token: nothing would predict the first response token"
            )


@dataclass(eq=False)
class Generation(ArrayRecord):
    """One sampled response of ``T`` tokens.

    ``token_ids`` [T] int32; ``logprobs`` [T] fp32 (natural, of the distribution at the sampling temperature, before
    top-p and top-k); ``finish_reason`` "stop" | "length" | "abort"; ``weight_versions`` [T] int64.
    """

    DTYPES = {"token_ids": np.int32, "logprobs": np.float32, "weight_versions": np.int64}

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    weight_versions: np.ndarray


class StartedBatch(Protocol):
    """Responses that are being sampled: :meth:`RolloutEngine.start` gives it, ``finish`` takes it."""

    def done_so_far(self) -> dict[int, Generation]:
        """The finished responses, by place in the requests."""

    def cancel(self) -> None:
        """Gives the rest up."""


class RolloutEngine(Protocol):
    """All that the training loop asks of an engine."""

    @property
    def version(self) -> int | None:
        """Of the weights that it samples with; None before the first."""

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        sampling: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Samples one response a request, in their order. ``progress(finished, total)`` is called now and then."""

    def start(self, requests: Sequence[GenerateRequest], sampling: SamplingParams) -> StartedBatch | None:
        """Begins to sample beside whatever the caller does next. None: this engine samples in ``generate`` alone."""

    def finish(self, started: StartedBatch, progress: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Waits for a started batch; returns as :meth:`generate` does."""

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes over all weights as one transaction. After an error the engine refuses to sample until a transaction
        succeeds."""

    def release_memory(self) -> None:
        """Gives back what it holds of the trainer's GPU until the next weights, where it can."""

    def close(self) -> None:
        """Frees what the engine holds."""
