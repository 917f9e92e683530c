"""Prompts, templates and the record of a response. Files come in as verl-style parquet, JSON lines or GSM8K."""

from dcpo_megatron.data.errors import DataError
from dcpo_megatron.data.prompts import Prompt, PromptOptions, PromptSet, load_prompts
from dcpo_megatron.data.response import Response, decode_responses, encode_responses
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.data.sampler import PromptSampler

__all__ = [
    "DataError",
    "Prompt",
    "PromptOptions",
    "PromptSampler",
    "PromptSet",
    "Response",
    "ResponseTable",
    "decode_responses",
    "encode_responses",
    "load_prompts",
]
