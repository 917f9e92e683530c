"""Checkpoints between Hugging Face, this project and stock Megatron-Core (both ends of it), in many layouts, bit for
bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankPool
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.reshard import Reshard
from dcpo_megatron.weights.to_hf import MegatronToHf
from dcpo_megatron.weights.to_megatron import HfToMegatron
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from tests.other_megatron import other_megatron


@pytest.fixture(scope="module", params=["installed", "other"])
def pool(request):
    other = [other_megatron()] if request.param == "other" else []
    with RankPool(8, python_path=list(map(str, other))) as pool:
        for folder in other:
            (version,) = pool.run("tests.weights.checkpoint_jobs:megatron_version", 1)
            assert version.startswith(folder.name.removeprefix("megatron-core-"))
        yield pool


def make(kind: str, folder: Path, dtype: str) -> None:
    make_model(kind, str(folder))
    if dtype != "float32":
        (file,) = folder.glob("*.safetensors")
        save_file({name: t.to(getattr(torch, dtype)) for name, t in load_file(file).items()}, file, {"format": "pt"})


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# kind, dtype, layout written for, layout resharded for, (ranks, layout) that stock Megatron-Core loads and saves in
ROUND_TRIPS = {
    "qwen2-tp2-pp2-vpp2-dp2": (
        "dense", "float32", dict(tensor=2), dict(),
        (8, dict(tensor=2, pipeline=2, virtual_pipeline=2)),
    ),
    "qwen2-bf16-tp2": ("dense", "bfloat16", dict(), dict(tensor=2), (2, dict(tensor=2))),
    "qwen2-tied-pp2-tp2": ("tied", "float32", dict(pipeline=2), dict(tensor=2), (4, dict(tensor=2, pipeline=2))),
    "qwen3-tp2-sp-cp2": (
        "qwen3", "float32", dict(tensor=2), dict(),
        (4, dict(tensor=2, sequence_parallel=True, context=2)),
    ),
    "llama-pp2-vpp2": (
        "llama", "bfloat16", dict(pipeline=2), dict(tensor=2),
        (2, dict(pipeline=2, virtual_pipeline=2)),
    ),
    "mistral-uneven-pp2": (
        "mistral", "float32", dict(pipeline=2, first_stage_layers=1), dict(tensor=2),
        (4, dict(tensor=2, pipeline=2, last_stage_layers=1)),
    ),
    "moe-ep2-pp2": (
        "moe", "float32", dict(expert=2), dict(tensor=2, sequence_parallel=True),
        (4, dict(expert=2, pipeline=2)),
    ),
    "moe-tp2-pp2-ep2-etp1": (
        "moe", "float32", dict(tensor=2, sequence_parallel=True, expert_tensor=1), dict(expert=2),
        (8, dict(tensor=2, sequence_parallel=True, pipeline=2, expert=2, expert_tensor=1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_round_trip_through_our_files_a_reshard_and_stock_megatron_is_bit_for_bit(pool, tmp_path, case):
    kind, dtype, first, second, (ranks, parallel) = ROUND_TRIPS[case]
    make(kind, tmp_path / "hf", dtype)
    wanted = hf_tensors(tmp_path / "hf")
    run_job(HfToMegatron(str(tmp_path / "hf"), ParallelLayout(**first)), tmp_path / "ours")
    run_job(Reshard(str(tmp_path / "ours"), ParallelLayout(**second)), tmp_path / "resharded")
    pool.run(
        "tests.weights.checkpoint_jobs:load_and_save_by_megatron", ranks,
        str(tmp_path / "hf"), str(tmp_path / "resharded"), str(tmp_path / "stock"), parallel, dtype,
    )  # fmt: skip
    run_job(MegatronToHf(str(tmp_path / "stock"), str(tmp_path / "hf")), tmp_path / "back")
    assert_same(hf_tensors(tmp_path / "back"), wanted)


@pytest.mark.parametrize(
    ("kind", "ranks", "parallel"),
    [
        ("dense", 4, dict(tensor=2, pipeline=2, virtual_pipeline=2)),
        ("tied", 2, dict(pipeline=2)),
        ("moe", 4, dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1)),
    ],
)
def test_the_trainer_starts_from_a_checkpoint_of_another_layout(pool, tmp_path, kind, ranks, parallel):
    make_model(kind, str(tmp_path / "hf"))
    run_job(HfToMegatron(str(tmp_path / "hf"), ParallelLayout()), tmp_path / "ours")
    for found in pool.run(
        "tests.weights.checkpoint_jobs:weights_loaded_by_us",
        ranks,
        str(tmp_path / "hf"),
        str(tmp_path / "ours"),
        parallel,
    ):
        assert_same(found, hf_tensors(tmp_path / "hf"))


def test_experts_come_back_from_stages_where_they_are_cut_otherwise_than_the_rest(pool, tmp_path):
    make_model("moe", str(tmp_path))
    layout = dict(tensor=2, sequence_parallel=True, pipeline=2, expert=2, expert_tensor=1)
    for found in pool.run("tests.weights.jobs:through_megatron", 4, str(tmp_path), layout):
        assert_same(found, hf_tensors(tmp_path))


def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


IDS = [3, 41, 5, 99, 18, 60, 2, 7, 88, 100, 14]


@pytest.mark.parametrize(
    ("experts", "ranks", "arguments"),
    [
        (False, 4, dict(tensor=2, pipeline=2)),
        (True, 2, dict(tensor=1, pipeline=1, expert=2)),
        (False, 2, dict(tensor=2, pipeline=1, metadata={"non_homogeneous_layers": True})),
        (True, 2, dict(tensor=1, pipeline=1, expert=2, metadata={"singleton_local_shards": True})),
    ],
    ids=["dense-tp2-pp2", "experts-ep2", "dense-per-layer", "experts-singleton"],
)
def test_a_checkpoint_that_plain_megatron_wrote_computes_the_same_in_transformers(
    pool, tmp_path, experts, ranks, arguments
):
    kind = "moe" if experts else "dense"
    make_model(kind, str(tmp_path / "hf"))
    pool.run("tests.weights.checkpoint_jobs:plain_save", ranks, str(tmp_path / "theirs"), experts=experts, **arguments)
    run_job(MegatronToHf(str(tmp_path / "theirs"), str(tmp_path / "hf")), tmp_path / "back")
    metadata = arguments.get("metadata")
    (theirs,) = pool.run(
        "tests.weights.checkpoint_jobs:plain_logits", 1, str(tmp_path / "theirs"), IDS, experts, metadata
    )
    assert (transformers_logits(tmp_path / "back", IDS) - theirs[:, :101]).abs().max() <= 1e-5


@pytest.mark.parametrize("experts", [False, True])
def test_a_checkpoint_that_we_wrote_computes_the_same_in_plain_megatron(pool, tmp_path, experts):
    make_model("moe" if experts else "dense", str(tmp_path / "hf"))
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    run_job(HfToMegatron(str(tmp_path / "hf"), layout), tmp_path / "ours")
    (theirs,) = pool.run("tests.weights.checkpoint_jobs:plain_logits", 1, str(tmp_path / "ours"), IDS, experts)
    assert (transformers_logits(tmp_path / "hf", IDS) - theirs[:, :101]).abs().max() <= 1e-5


def test_resharding_keeps_the_optimizer_state_and_stock_megatron_goes_on_with_it(pool, tmp_path):
    make_model("dense", str(tmp_path / "hf"))
    job = "tests.weights.checkpoint_jobs:plain_training_state"
    pool.run(job, 2, None, str(tmp_path / "theirs"), 2, 1)
    run_job(Reshard(str(tmp_path / "theirs"), ParallelLayout(pipeline=2), str(tmp_path / "hf")), tmp_path / "ours")
    pool.run(job, 2, str(tmp_path / "ours"), str(tmp_path / "again"), 1, 2)
    wanted, ours, again = (TorchDistFolder(tmp_path / name) for name in ("theirs", "ours", "again"))
    assert wanted.tensors.keys() == ours.tensors.keys() == again.tensors.keys()
    assert sum("exp_avg_sq" in key for key in wanted.tensors) == len(wanted.tensors) // 4
    for key in wanted.tensors:
        rows = slice(101) if "embedding" in key or "output_layer" in key else slice(None)
        assert torch.equal(ours.read(key)[rows], wanted.read(key)[rows]), key
        assert torch.equal(again.read(key)[rows], wanted.read(key)[rows]), key
    steps = [folder.common()["optimizer"]["optimizer"]["param_groups"][0]["step"] for folder in (wanted, ours, again)]
    assert steps == [2, 2, 2]


def test_optimizer_state_that_is_tied_to_its_layout_is_refused_by_name(pool, tmp_path):
    make_model("dense", str(tmp_path / "hf"))
    pool.run(
        "tests.weights.checkpoint_jobs:plain_training_state", 2, None, str(tmp_path / "theirs"), 2, 1, "dp_reshardable"
    )
    with pytest.raises(CheckpointError, match=r"dp_reshardable.*save it as fully_reshardable"):
        Reshard(str(tmp_path / "theirs"), ParallelLayout(), str(tmp_path / "hf"))
    # The weights alone convert.
    run_job(MegatronToHf(str(tmp_path / "theirs"), str(tmp_path / "hf")), tmp_path / "back")
    assert hf_tensors(tmp_path / "back").keys() == hf_tensors(tmp_path / "hf").keys()
