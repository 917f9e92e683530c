"""Prepares the CPU platform before any test file imports Megatron-Core, and makes tiny model folders (config.json
only)."""

from pathlib import Path

import pytest
import torch.distributed as dist

from dcpo_megatron.mcore.platform import prepare, select_platform

prepare(select_platform("cpu"))


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A Qwen2 of 4 layers, 4 heads, 2 key-value heads, 64 positions."""
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"
