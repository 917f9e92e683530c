"""Transformer Engine's layers and optimizer under both Megatron-Cores: names, marks, the certificate's layouts,
checkpoints with it and without.

Its Python is the real one, the kernels are the stand-in's formulas (see ``standin/transformer_engine``).
"""

import os

import pytest
import torch
from safetensors.torch import load_file

from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.verification import cases, certificate
from dcpo_megatron.verification.layouts import find_layouts
from dcpo_megatron.verification.ranks import RankPool
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.to_hf import MegatronToHf
from dcpo_megatron.weights.to_megatron import HfToMegatron
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from tests.transformer_engine import other_path, python_path

# DCPO_TEST_LAYOUTS: others of the certificate's, by name, or "all" that the unfused attention can do on four ranks.
LAYOUTS = os.environ.get("DCPO_TEST_LAYOUTS", "dp1,tp2-sp,dp2,dp2-ep2/moe")
if LAYOUTS == "all":
    LAYOUTS = ",".join(x.name for x in find_layouts("all") if x.world <= 4 and x.parallel.get("context", 1) == 1)
RANKS = max(layout.world for layout in find_layouts(LAYOUTS))
SP2 = dict(tensor=2, sequence_parallel=True)
KINDS = {"dense": SP2, "qwen3": SP2, "moe": dict(expert=2)}


@pytest.fixture(scope="module", params=["installed", "other"])
def megatron(request):
    return request.param


@pytest.fixture(scope="module")
def pool(megatron):
    with RankPool(RANKS, python_path=python_path(megatron)) as pool:
        yield pool


@pytest.fixture(scope="module")
def without(megatron, pool):
    """Ranks that have no Transformer Engine: their optimizer is PyTorch's Adam."""
    with RankPool(2, python_path=other_path(megatron)) as pool:
        yield pool


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        cases.make_model(kind, str(folder / kind))
    return folder


def tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the second norm of a layer with experts under one name."""
    read = TorchDistFolder(folder)
    return {k.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): read.read(k) for k in read.tensors}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize(("kind", "parallel"), [*KINDS.items(), ("moe", SP2)], ids=str)
def test_parameters_have_the_shapes_and_marks_of_the_local_layers_and_hf_tensors_come_back_bit_for_bit(
    pool, models, kind, parallel
):
    wanted = load_file(models / kind / "model.safetensors")
    for classes, found, plain, back in pool.run(
        "tests.transformer_engine.jobs:build_both", 2, str(models / kind), parallel
    ):
        assert "transformer_engine" in classes and found == plain
        assert_same(back, wanted)


def test_layouts_give_the_gradient_of_one_process(pool):
    verdicts = certificate.certify(
        find_layouts(LAYOUTS), cases.find_objectives("dcpo-paper"), pool=pool, transformer_engine="on"
    )
    assert [verdict for verdict in verdicts if not verdict.passed] == []


def test_formulas_that_no_layout_runs_are_those_of_torch(pool):
    (differences,) = pool.run("tests.transformer_engine.jobs:formulas", 1)
    assert max(differences.values()) <= 2e-6, differences


@pytest.mark.parametrize(("kind", "dtype", "close"), [("dense", "bfloat16", 2e-2), ("moe", "float32", 1e-5)])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_goes_on_with_and_without_transformer_engine(pool, without, models, tmp_path, kind, dtype, close, steps):
    """Weights, main weights and Adam's state bit for bit, before the first step and after some; then the same steps up
    to rounding."""
    hf, parallel = str(models / kind), KINDS[kind]
    with_it, without_it = (pool, "on"), (without, "off")

    def run(job, side, folder, **more):
        ranks, layers = side
        return ranks.run(
            f"tests.mcore.state_jobs:{job}", 2, hf, parallel, str(tmp_path / folder), "adam", dtype,
            steps=steps, transformer_engine=layers, **more,
        )[0][0]  # fmt: skip

    for first, second in ((with_it, without_it), (without_it, with_it), (with_it, with_it)):
        saved, again = f"{first[1]}-{second[1]}", f"{first[1]}-{second[1]}-again"
        norms = run("train_and_save", first, saved)
        norms_after = run("restore_and_train", second, saved, again=str(tmp_path / again))
        assert_same(tensors(tmp_path / again), tensors(tmp_path / saved))
        settings = TorchDistFolder(tmp_path / again).common()["optimizer"]
        groups = (settings if "optimizer" in settings else settings[0])["optimizer"]["param_groups"]
        assert {group["step"] for group in groups} == {steps}
        assert norms_after == (norms if first is second else pytest.approx(norms, rel=close))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_megatron_loads_a_converted_checkpoint_into_its_layers(pool, models, tmp_path, kind):
    run_job(HfToMegatron(str(models / kind), ParallelLayout()), tmp_path / "ours")
    pool.run(
        "tests.weights.checkpoint_jobs:load_and_save_by_megatron", 2, str(models / kind), str(tmp_path / "ours"),
        str(tmp_path / "stock"), KINDS[kind], "float32", transformer_engine="on",
    )  # fmt: skip
    run_job(MegatronToHf(str(tmp_path / "stock"), str(models / kind)), tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(models / kind / "model.safetensors"))


def test_every_faster_way_together_trains_as_none_of_them_does(pool, models):
    """Grouped experts, gradients added up by the products, fused activations, overlap: two experts a rank, two ranks,
    five updates."""
    job = "tests.mcore.overlap_jobs:train", 2, str(models / "moe"), KINDS["moe"]
    ways = ("bias_activation_fusion", "gradient_accumulation_fusion", "grouped_experts")
    with_them, without_them = (
        pool.run(*job, word, "float32", transformer_engine="on", **dict.fromkeys(ways, word)) for word in ("on", "off")
    )
    for (grouped, _, found), (single, _, wanted) in zip(with_them, without_them, strict=True):
        assert "decoder.layers.0.mlp.experts.linear_fc1.weight1" in grouped
        assert "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight" in single
        for ours, theirs in zip(found, wanted, strict=True):
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert float((a - b).norm()) <= 2e-5 * float(b.norm())
