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


@pytest.fixture(scope="module")
def large_pool():
    with RankPool(8) as pool:
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


@pytest.mark.parametrize(
    ("kind", "parallel", "world"),
    [
        ("dense", {"tensor": 2, "pipeline": 2}, 8),
        ("tied", {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, 4),
        ("moe", {"expert": 2, "pipeline": 2}, 8),
        ("moe", {"expert": 2, "tensor": 2, "expert_tensor": 1}, 4),
        ("dense", {}, 2),
    ],
    ids=["tp2-pp2-dp2", "pp2-vpp2-cp2", "ep2-pp2-dp4", "ep2-tp2-etp1-dp2", "dp2"],
)
def test_for_the_first_rank_one_replica_gathers_and_no_tensor_crosses_stages_to_another(
    large_pool, tmp_path, kind, parallel, world
):
    make_model(kind, str(tmp_path))
    found = large_pool.run("tests.weights.jobs:on_first", world, str(tmp_path), parallel)
    assert all(right for right, _, _ in found)
    # Ranks lie stage by stage, data-parallel peers together, tensor-parallel ones closest.
    stage = world // parallel.get("pipeline", 1)
    replica = max(parallel.get("tensor", 1), parallel.get("expert", 1))
    idle = [received for rank, (_, _, received) in enumerate(found) if rank % stage >= replica]
    assert not any(idle)
    for rank, (_, everywhere, received) in enumerate(found):
        crosses = "pipeline" in parallel and rank  # everywhere, each rank has the other stages' tensors too
        assert received < everywhere if crosses else received <= everywhere


def test_an_update_with_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(pool, tmp_path):
    make_model("dense", str(tmp_path))
    for first, second, unchanged in pool.run("tests.weights.jobs:update_with_a_bad_number", 2, str(tmp_path), {}):
        assert first and not second and all(unchanged)
