"""Weights through the sharded Megatron model and back, on real ranks."""

import pytest
import torch
from safetensors.torch import load_file

from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "first_stage_layers": 1}, {}],
    ids=["tp2", "pp2-vpp2", "pp2-first1", "dp2"],
)
@pytest.mark.parametrize("kind", ["dense", "tied", "qwen3", "llama"])
def test_weights_come_back_bit_for_bit_on_every_rank(pool, tmp_path, kind, parallel):
    make_model(kind, str(tmp_path))
    wanted = load_file(tmp_path / "model.safetensors")
    for found in pool.run("tests.weights.jobs:through_megatron", 2, str(tmp_path), parallel):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_expert_weights_come_back_bit_for_bit(pool, tmp_path):
    make_model("moe", str(tmp_path))
    wanted = load_file(tmp_path / "model.safetensors")
    for found in pool.run("tests.weights.jobs:through_megatron", 2, str(tmp_path), {"expert": 2}):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_update_with_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(pool, tmp_path):
    make_model("dense", str(tmp_path))
    for first, second, unchanged in pool.run("tests.weights.jobs:update_with_a_bad_number", 2, str(tmp_path), {}):
        assert first and not second and all(unchanged)
