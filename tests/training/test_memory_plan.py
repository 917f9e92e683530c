"""Every formula of the memory plan beside what Megatron-Core and PyTorch really hold, on small models, within 5 %; and
what `dcpo train --check` makes of it.
"""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcpo_megatron.cli.train import main
from dcpo_megatron.config.loading import load_config
from dcpo_megatron.mcore.hf_config import read_shape
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.memory.activations import Compute, chunk_passes, final_bytes, kept_bytes, layer_bytes
from dcpo_megatron.memory.plan import GB, cache_token_bytes, embedded_bytes, memory_problems, plan_memory
from dcpo_megatron.memory.states import model_elements, sharing_ranks, stage_chunks, state_bytes
from dcpo_megatron.memory.step_estimate import Hardware, estimate_step
from dcpo_megatron.training.checks import check_run
from dcpo_megatron.verification.ranks import RankPool
from tests.training import memory_jobs as job

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "models"
CONFIGS = ROOT / "examples" / "configs"
# Recipe -> model, training ranks, more of the command line.
RECIPES = {
    "qwen2.5-math-7b": ("qwen2.5-math-7b", 24, ()),
    "qwen2.5-math-7b-colocated": ("qwen2.5-math-7b", 32, ()),
    "qwen2.5-math-1.5b": ("qwen2.5-math-1.5b", 4, ()),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", 32, ("--server-gpus=16",)),
}
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
FULL, FUSED, SGD = {"recompute": "full"}, {"fused_head_loss": "on"}, {"optimizer": "sgd"}
SPLIT = {"tensor": 2, "sequence_parallel": True}
# Layout -> ranks, model, its parallel section, what is measured in it.
LAYOUTS = {
    "dp1": (1, "qwen2", {}, [FP32, BF16, FP32 | FULL, BF16 | FUSED, BF16 | SGD]),
    "dp2": (2, "qwen2/tied", {}, [FP32, BF16]),
    "tp2-sp": (2, "qwen2", SPLIT, [FP32, BF16, BF16 | FULL]),
    "pp2": (2, "qwen2/tied", {"pipeline": 2}, [BF16, FP32 | FULL]),
    "vpp2": (2, "qwen2", {"pipeline": 2, "virtual_pipeline": 2}, [BF16]),
    "ep2": (2, "qwen3_moe", {"expert": 2}, [FP32, BF16]),
}


@pytest.fixture(scope="module")
def measured():
    with RankPool(2, python_path=[str(ROOT)]) as pool:
        return {
            name: pool.run("tests.training.memory_jobs:measure", world, model, parallel, cases, timeout=200)
            for name, (world, model, parallel, cases) in LAYOUTS.items()
        }


def places():
    """Layout, rank and case of everything that was measured."""
    return [
        pytest.param(name, rank, number, id="-".join((name, f"rank{rank}", *map(str, case.values()))))
        for name, (world, _, _, cases) in LAYOUTS.items()
        for rank in range(world)
        for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "rank", "number"), places())
def test_weights_gradients_and_optimizer_are_those_that_megatron_holds(measured, name, rank, number):
    world, model, parallel, cases = LAYOUTS[name]
    shape, layout = job.shape(model), ParallelLayout(**parallel)
    stage = rank if layout.pipeline > 1 else 0
    planned = state_bytes(
        stage_chunks(shape, layout, stage),
        sharing_ranks(shape, layout, world),
        cases[number]["dtype"],
        cases[number].get("optimizer", "adam"),
    )
    found = measured[name][rank][number]
    assert planned == pytest.approx([found["weights"], found["gradients"], found["optimizer"]], rel=0.05)


@pytest.mark.parametrize(("name", "rank", "number"), places())
def test_activations_are_those_that_autograd_keeps(measured, name, rank, number):
    _, model, parallel, cases = LAYOUTS[name]
    shape, layout, case, found = (
        job.shape(model),
        ParallelLayout(**parallel),
        cases[number],
        measured[name][rank][number],
    )
    tokens, responses = job.SEQUENCES * job.TOKENS, job.SEQUENCES * (job.TOKENS - job.PROMPT)
    compute = Compute(
        case["dtype"],
        "local",
        "cpu",
        recompute=case.get("recompute", "none"),
        fused_head="fused_head_loss" in case,
        busiest_experts=found["routed"] / (tokens * shape.experts_per_token) if shape.experts else 1.0,
    )
    stage = rank if layout.pipeline > 1 else 0
    # The head's share is gone when a layer is computed again.
    head = final_bytes(shape, layout, compute, tokens, responses) if stage == layout.pipeline - 1 else 0
    again = layer_bytes(shape, layout, compute, tokens) if compute.recompute == "full" else 0
    planned = kept_bytes(shape, layout, compute, tokens, stage, job.MICRO_BATCHES) + max(head, again)
    assert planned == pytest.approx(found["kept"], rel=0.05)


def test_passes_under_way_never_exceed_the_passes_there_are():
    interleaved = ParallelLayout(pipeline=4, virtual_pipeline=2)
    assert [chunk_passes(ParallelLayout(pipeline=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunk_passes(interleaved, stage) for stage in range(4)] == [11, 9, 7, 5]
    assert chunk_passes(ParallelLayout(pipeline=4), 0, 2) == 2
    assert chunk_passes(interleaved, 0, 4) == 8


def test_the_embedded_engine_holds_the_whole_model_and_a_cache_of_its_batch(model_folder):
    from dcpo_megatron.rollout import EmbeddedEngine

    run = run_of(
        model_folder, 1, "model.dtype=float32", "data.max_prompt_tokens=8", "rollout.max_response_tokens=16",
        "rollout.batch_size=3", "rollout.prompts_per_step=32",
    )  # fmt: skip
    engine = EmbeddedEngine(model_folder, load=False)
    model, cache = embedded_bytes(run)
    assert model == sum(parameter.nbytes for parameter in engine.model.parameters())
    _, found, _ = engine._prefill([(1,) * 24] * 3)
    held = sum(tensor.nbytes for layer in found.layers for tensor in (layer.keys, layer.values))
    assert held == 3 * 24 * cache_token_bytes(run)
    assert cache == held * 5 // 4 + 45 * 3 * 100


def megatron_lm_formulas():
    """Megatron-LM's own estimate, which comes with newer wheels of Megatron-Core; read without the trainer around
    it."""
    unpacked = Path(sys.prefix) / "megatron-core-0.19.2" / "megatron"
    places = [unpacked, *map(Path, importlib.util.find_spec("megatron").submodule_search_locations)]
    files = [place / "training" / "theoretical_memory_usage.py" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        pytest.skip("no Megatron-Core here that brings theoretical_memory_usage.py")
    names: dict = {"is_hybrid_model": None, "print_rank_0": print}
    exec(file.read_text(encoding="utf-8").replace("from .utils import is_hybrid_model, print_rank_0", ""), names)
    return names["compute_weight_and_optimizer_memory"]


@pytest.mark.parametrize("model", ["qwen2.5-math-7b", "qwen3-30b-a3b"])
def test_weights_gradients_and_optimizer_are_those_of_megatron_lms_formula(model):
    shape = read_shape(MODELS / model)
    layout = ParallelLayout(tensor=4, sequence_parallel=True, expert=8 if shape.experts else 1, expert_tensor=1)
    theirs = megatron_lm_formulas()(
        SimpleNamespace(
            kv_channels=shape.head_dim, num_attention_heads=shape.heads, hidden_size=shape.hidden,
            group_query_attention=True,
            num_query_groups=shape.kv_heads, num_experts=shape.experts or None, swiglu=True, moe_layer_freq=1,
            num_layers=shape.layers, moe_ffn_hidden_size=shape.expert_ffn, mtp_num_layers=None, normalization="RMSNorm",
            multi_latent_attention=False, padded_vocab_size=-(-shape.vocab // 512) * 512,
            moe_router_topk=shape.experts_per_token,
            untie_embeddings_and_output_weights=True, ffn_hidden_size=shape.ffn,
            moe_shared_expert_intermediate_size=None,
            moe_latent_size=None, add_bias_linear=False, expert_tensor_parallel_size=1,
            expert_model_parallel_size=layout.expert,
            pipeline_model_parallel_size=1, tensor_model_parallel_size=4, world_size=32, data_parallel_size=8,
            use_distributed_optimizer=True,
        )
    )  # fmt: skip
    ours = sum(state_bytes(stage_chunks(shape, layout, 0), sharing_ranks(shape, layout, 32), "bfloat16", "adam"))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_elements_of_the_models_are_the_published_ones():
    billions = {
        name: model_elements(read_shape(MODELS / name))
        for name in ("qwen2.5-math-7b", "qwen2.5-math-1.5b", "qwen3-30b-a3b")
    }
    assert billions["qwen2.5-math-7b"][0] == 7_615_616_512
    assert billions["qwen2.5-math-1.5b"][0] == 1_543_714_304
    assert billions["qwen3-30b-a3b"][0] == 30_532_122_624
    assert 3.0e9 < billions["qwen3-30b-a3b"][1] < 3.4e9  # A3B: three billions are active


# -- what a person sees ----------------------------------------------------------------------------------------------


def run_of(model, ranks, *overrides, recipe=None):
    given = [f"model.path={model}", "data.files=[train.parquet]", *overrides]
    return check_run(load_config([CONFIGS / f"{recipe}.yaml"] if recipe else [], given), ranks)


def check(recipe, ranks, *words):
    model = RECIPES[recipe][0]
    return main(
        ["--check", "--ranks", str(ranks), "--config", str(CONFIGS / f"{recipe}.yaml"), f"model.path={MODELS / model}",
         "data.files=[train.parquet]", *words]
    )  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_fits_its_gpus_and_says_so_as_the_plan_does(recipe, capsys):
    model, ranks, words = RECIPES[recipe]
    assert check(recipe, ranks, "--gpu-memory", "80", *words) == 0
    said = capsys.readouterr().out
    assert f"the configuration fits: {ranks} ranks" in said
    assert "an estimate for H100 80 GB, not measured" in said
    assert "not looked at: weights" in said and "not looked at: tokenizer" in said
    run = run_of(MODELS / model, ranks, recipe=recipe)
    most = max(group.total for group in plan_memory(run))
    assert most < 72 * GB
    header = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    assert re.search(r"at most (\d+) GB", header)[1] == f"{most / GB:.0f}"
    servers = int(words[0].partition("=")[2]) if words else None
    assert re.search(r"about (\d+) s a step", header)[1] == f"{estimate_step(run, servers).total:.0f}"


def test_what_cannot_fit_is_refused_with_the_ranks_the_largest_part_and_what_helps(capsys):
    wide = ["parallel.tensor=1", "parallel.sequence_parallel=false", "training.micro_batch_tokens=16384"]
    assert check("qwen2.5-math-7b", 24, "--gpu-memory", "80", *wide) == 2
    streams = capsys.readouterr()
    assert "the configuration fits" not in streams.out
    first = next(line for line in streams.err.splitlines() if "ranks 0-7, stage 0" in line)
    assert re.search(r"\d+\.\d GB are needed, a GPU has 80\.0; the largest part is activations \(\d+\.\d GB\)", first)
    # What is promised for a change is what the plan then says.
    promised = float(re.search(r"model\.recompute=full \((\d+\.\d) GB\)", first)[1])
    changed = run_of(MODELS / "qwen2.5-math-7b", 24, *wide, "model.recompute=full", recipe="qwen2.5-math-7b")
    assert max(group.total for group in plan_memory(changed)) / GB == pytest.approx(promised, abs=0.05)
    assert (
        check("qwen2.5-math-7b", 24, *wide) == 0
    )  # without a GPU and without a limit the plan is printed, and no more


def test_flags_of_the_check_are_refused_without_it(capsys):
    assert main(["--gpu-memory", "80", "model.path=m", "data.files=[t]"]) == 2
    assert "--check" in capsys.readouterr().err


def test_reference_engine_and_colocated_servers_have_their_part():
    recipe, model = "qwen2.5-math-7b-colocated", MODELS / "qwen2.5-math-7b"
    (plain,) = plan_memory(run_of(model, 32, recipe=recipe))
    (with_kl,) = plan_memory(run_of(model, 32, "objective.kl_coef=0.001", recipe=recipe))
    assert with_kl.parts["reference"] == pytest.approx(plain.parts["weights"], rel=0.01)
    assert plain.parts["server's share"] - plain.parts["server's rest"] == 48 * GB
    # While the server samples the optimizer is on the host and there are no gradients.
    assert plain.total == sum(plain.parts[part] for part in ("weights", "reserve", "server's share"))
    embedded = ["rollout.engine=embedded", "servers.file=null", "publish.colocated=false", "rollout.batch_size=64"]
    (own,) = plan_memory(run_of(model, 32, *embedded, recipe=recipe))
    assert own.parts["engine's model"] == 2 * 7_615_616_512
    # 57,344 bytes a token, 4,096 tokens, 64 responses: 15 GB, a layer's copy, and the numbers of sampling.
    assert 15 * GB < own.parts["engine's cache"] < 16.5 * GB


def test_stages_that_need_the_same_are_one_line():
    groups = plan_memory(
        run_of(
            MODELS / "qwen2.5-math-7b",
            32,
            "parallel.pipeline=4",
            "parallel.tensor=4",
            "parallel.sequence_parallel=true",
        )
    )
    assert [group.name for group in groups] == [
        "ranks 0-7, stage 0",
        "ranks 8-15, stage 1",
        "ranks 16-23, stage 2",
        "ranks 24-31, stage 3",
    ]
    tiny = memory_problems(run_of(MODELS / "qwen2.5-math-7b", 32, "parallel.pipeline=4"), GB)
    assert len(tiny) == 4


# -- the estimate ----------------------------------------------------------------------------------------------------


def test_an_estimate_follows_gpus_recomputation_and_staleness():
    recipe, model = "qwen2.5-math-7b-colocated", MODELS / "qwen2.5-math-7b"
    few, many = (estimate_step(run_of(model, ranks, recipe=recipe)).seconds for ranks in (16, 32))
    for part in ("forward and backward", "old log-probs"):
        assert few[part] == pytest.approx(2 * many[part])
    again = estimate_step(run_of(model, 32, "model.recompute=full", recipe=recipe)).seconds
    assert again["forward and backward"] == pytest.approx(many["forward and backward"] * 4 / 3)
    once = ["rollout.prompts_per_step=32", "training.minibatch_prompts=32"]
    limit, no_limit, reference = (
        estimate_step(run_of(model, 32, *once, f"rollout.max_mismatch={limit}", *more, recipe=recipe)).seconds
        for limit, *more in (("0.2",), ("null",), ("null", "objective.kl_coef=0.1"))
    )
    seconds = [found["old log-probs"] for found in (no_limit, limit, reference)]
    assert seconds[0] == 0 and seconds[1] == seconds[2] > 0
    separate = "qwen2.5-math-7b"
    beside = estimate_step(run_of(model, 24, "rollout.max_staleness=1", recipe=separate))
    assert beside.total == pytest.approx(
        max(beside.seconds["rollout"], sum(beside.seconds.values()) - beside.seconds["rollout"])
    )
    run = run_of(model, 24, recipe=separate)
    slow = dataclasses.replace(Hardware(), bandwidth=Hardware.bandwidth / 2)
    assert estimate_step(run, card=slow).seconds["rollout"] > estimate_step(run).seconds["rollout"]
    assert estimate_step(run, 16).seconds["rollout"] < estimate_step(run, 8).seconds["rollout"]


def test_the_embedded_engine_is_many_times_slower_than_servers_on_the_same_gpus():
    recipe, model = "qwen2.5-math-7b-colocated", MODELS / "qwen2.5-math-7b"
    embedded = ["rollout.engine=embedded", "servers.file=null", "publish.colocated=false", "rollout.batch_size=64"]
    own, servers = (
        estimate_step(run_of(model, 32, *embedded, recipe=recipe)),
        estimate_step(run_of(model, 32, recipe=recipe)),
    )
    assert own.seconds["rollout"] > 5 * servers.seconds["rollout"]
    assert own.seconds["publish"] == 0
