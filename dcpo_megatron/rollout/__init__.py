"""Sampling responses: the engine protocol, the embedded engine on Hugging Face transformers, and, in modules of their
own, the client of SGLang servers (``fleet``, ``server``, ``server_client``) and their launcher (``serving``)."""

from dcpo_megatron.rollout.embedded import EmbeddedEngine
from dcpo_megatron.rollout.protocol import (
    GenerateRequest,
    Generation,
    RolloutEngine,
    RolloutError,
    SamplingParams,
    StartedBatch,
)

__all__ = [
    "EmbeddedEngine",
    "GenerateRequest",
    "Generation",
    "RolloutEngine",
    "RolloutError",
    "SamplingParams",
    "StartedBatch",
]
