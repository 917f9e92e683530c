"""Sampling responses: the engine protocol and the embedded engine on Hugging Face transformers."""

from dcpo_megatron.rollout.embedded import EmbeddedEngine
from dcpo_megatron.rollout.protocol import GenerateRequest, Generation, RolloutEngine, RolloutError, SamplingParams

__all__ = ["EmbeddedEngine", "GenerateRequest", "Generation", "RolloutEngine", "RolloutError", "SamplingParams"]
