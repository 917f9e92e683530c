"""Every family found in the package: its table against a small transformers model of its own, its weights and log-probs
through Megatron-Core.

A new family's file is picked up here by itself; nothing below knows a family by name except where it says so.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.mcore.families import FAMILIES, discover
from dcpo_megatron.mcore.families.base import Family, Rule
from dcpo_megatron.mcore.hf_config import ModelConfigError, read_shape, shape_of
from dcpo_megatron.rollout.embedded import EmbeddedEngine
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankFailure, RankPool
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.mapping import hf_names, hf_shapes, parameter_names, rule_for

ALL = list(FAMILIES)


def write_model(model_type, folder, **changes):
    make_model(model_type, str(folder), **changes)
    return folder


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ALL)
def test_the_table_covers_exactly_the_tensors_of_the_familys_checkpoint_by_name_and_shape(tmp_path, model_type, tied):
    folder = write_model(model_type, tmp_path, tie_word_embeddings=tied)
    shape = read_shape(folder)
    table = {}
    for name in parameter_names(shape):
        rule = rule_for(name, shape)
        table |= zip(rule.hf_names, hf_shapes(rule, shape), strict=True)
    assert table == {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert sorted(hf_names(shape)) == sorted(table)


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=["tp2-sp", "pp2"])
@pytest.mark.parametrize("model_type", ALL)
def test_megatron_has_the_listed_parameters_and_gives_the_weights_back_bit_for_bit(
    pool, tmp_path, model_type, parallel
):
    folder = write_model(model_type, tmp_path)
    wanted = load_file(folder / "model.safetensors")
    for found, parameters in pool.run("tests.weights.jobs:weights_and_parameters", 2, str(folder), parallel):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert sorted(parameters) == sorted(parameter_names(read_shape(folder)))


@pytest.mark.parametrize("model_type", ALL)
def test_log_probs_through_megatron_are_those_of_transformers(pool, tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    folder = write_model(model_type, tmp_path)
    tokens = [(7 * n) % 97 for n in range(24)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    wanted = torch.log_softmax(logits[3:-1], -1).gather(1, torch.tensor(tokens[4:])[:, None])[:, 0]
    parallel = {"tensor": 2, "sequence_parallel": True}
    for found in pool.run("tests.weights.jobs:logprobs", 2, str(folder), parallel, tokens, 4):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert wanted.std() > 0.1  # a model that is far from uniform


def give_to_the_rollout_engine(folder):
    """The folder's tensors, under their checkpoint names, into an engine without weights; its logits are then the
    folder's own."""
    from transformers import AutoModelForCausalLM

    engine = EmbeddedEngine(folder, load=False)
    engine.load_weights(load_file(folder / "model.safetensors").items(), version=1)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.equal(engine.model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ALL)
def test_the_embedded_rollout_engine_takes_the_weights(tmp_path, model_type, tied):
    give_to_the_rollout_engine(write_model(model_type, tmp_path, tie_word_embeddings=tied))


def test_the_rollout_engine_does_not_fill_copies_of_its_weights(tmp_path, monkeypatch):
    from transformers import core_model_loading

    engine = EmbeddedEngine(write_model("qwen3_moe", tmp_path), load=False)
    views = core_model_loading.revert_weight_conversion
    monkeypatch.setattr(
        core_model_loading,
        "revert_weight_conversion",
        lambda model, tensors: {name: tensor.clone() for name, tensor in views(model, tensors).items()},
    )
    with pytest.raises(RolloutError, match="as a copy"):
        engine.load_weights(load_file(tmp_path / "model.safetensors").items(), version=1)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        *((model_type, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported") for model_type in ALL),
        ("qwen3", {"attention_bias": True}, "attention_bias=true is not supported for qwen3"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true is not supported for llama"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "every layer must have experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "every layer must have experts"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "the router learns nothing"),
    ],
)
def test_what_the_layers_cannot_compute_is_refused_by_the_familys_file(model_type, changes, message):
    with pytest.raises(ModelConfigError) as caught:
        shape_of(FAMILIES[model_type].tiny_config(**changes))
    assert message in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ModelConfigError, match=r"hidden_act=.*; .*attention_bias=.*; .*mlp_bias="):
        shape_of(FAMILIES["llama"].tiny_config(hidden_act="gelu", attention_bias=True, mlp_bias=True))


@pytest.mark.parametrize(
    ("model_type", "changes", "positions"),
    [
        ("mistral", {"sliding_window": 24}, 24),
        ("mistral", {"sliding_window": 1000}, 128),
        ("mistral", {"sliding_window": None}, 128),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}, 24),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24}, 128),
    ],
)
def test_a_sliding_window_in_use_is_the_longest_sequence(model_type, changes, positions):
    assert shape_of(FAMILIES[model_type].tiny_config(**changes)).max_positions == positions


def test_a_model_with_a_sliding_window_is_the_same_up_to_that_length(pool, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_model("mistral", tmp_path, sliding_window=24)
    tokens = [(7 * n) % 97 for n in range(25)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = [model(torch.tensor([tokens[:n]])).logits[0] for n in (24, 25)]
    wanted = torch.log_softmax(logits[0][3:-1], -1).gather(1, torch.tensor(tokens[4:24])[:, None])[:, 0]
    longer = pool.run("tests.weights.jobs:logprobs", 1, str(folder), {}, [*tokens, 0], 4)[0]
    torch.testing.assert_close(longer[:20], wanted, rtol=2e-5, atol=2e-5)
    # One token more, and the window hides the first one.
    last = torch.log_softmax(logits[1][-1], -1)[0]
    assert abs(float(last - longer[-1])) > 1e-3


def test_a_family_that_is_not_there_is_refused_with_the_known_ones():
    from transformers import GPT2Config

    with pytest.raises(ModelConfigError) as caught:
        shape_of(GPT2Config())
    assert all(model_type in str(caught.value) for model_type in ALL)


@pytest.mark.parametrize("model_type", ALL)
def test_a_tensor_of_another_shape_is_refused_by_name_before_any_weight_is_read(tmp_path, model_type):
    folder = write_model(model_type, tmp_path)
    shape, tensors = read_shape(folder), load_file(folder / "model.safetensors")
    for name, wrong in (("model.layers.2.self_attn.k_proj.weight", 1), ("model.embed_tokens.weight", 0)):
        cut = tensors[name].narrow(wrong, 0, tensors[name].shape[wrong] - 1).contiguous()
        save_file(tensors | {name: cut}, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            check_folder(SafetensorsFolder(folder), shape)
        assert f"{name} is {list(cut.shape)}, config.json makes it {list(tensors[name].shape)}" in str(caught.value)


def test_missing_and_surplus_tensors_are_refused_by_name(tmp_path):
    folder = write_model("llama", tmp_path)
    shape, tensors = read_shape(folder), load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.9.what.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has tensor 'model.layers.9.what.weight' \(1 such\)"):
        check_folder(SafetensorsFolder(folder), shape)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.layers.3.mlp.up_proj.weight'"):
        check_folder(SafetensorsFolder(folder), shape)


# -- a new family is one file ----------------------------------------------------------------------

# The file that the documentation shows.
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "model_families.md"
NEW_FAMILY = DOCUMENTED.read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes modules into an empty package and discovers its families."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, **modules):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        importlib.invalidate_caches()
        return discover(name, [str(folder)])

    yield write
    for name in [name for name in sys.modules if name.split(".")[0].startswith("families_of_")]:
        del sys.modules[name]


def test_a_file_dropped_into_the_package_is_a_family_with_names_of_its_own(package, monkeypatch, tmp_path):
    found = package("families_of_one", base="", mixtral=NEW_FAMILY)
    assert list(found) == ["mixtral"] and isinstance(found["mixtral"], Family)
    monkeypatch.setitem(FAMILIES, "mixtral", found["mixtral"])
    folder = write_model("mixtral", tmp_path)
    shape = read_shape(folder)
    assert (shape.experts, shape.expert_ffn, shape.norm_topk_prob) == (4, 48, True)
    check_folder(SafetensorsFolder(folder), shape)
    give_to_the_rollout_engine(folder)
    assert rule_for("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight", shape, 2, 2).hf_names == (
        "model.layers.2.block_sparse_moe.experts.3.w1.weight",
        "model.layers.2.block_sparse_moe.experts.3.w3.weight",
    )


def test_two_files_with_one_model_type_are_an_error_that_names_both(package):
    with pytest.raises(ValueError, match=r"families_of_two.a and families_of_two.b both describe model_type 'mixtral'"):
        package("families_of_two", a=NEW_FAMILY, b=NEW_FAMILY)


def test_a_file_without_a_family_is_an_error_that_names_it(package):
    with pytest.raises(TypeError, match=r"families_of_none.empty has no FAMILY"):
        package("families_of_none", empty="")


@pytest.mark.parametrize(
    ("kind", "names", "sizes", "message"),
    [
        ("diagonal", ("a",), (("hidden",),), "kind 'diagonal'"),
        ("gated", ("a",), (("ffn", "hidden"),), "a gated rule has 2 tensors"),
        ("qkv", ("q", "k", "v"), (("queries",), ("keys",)), "a qkv rule has 3 tensors"),
        ("plain", ("a",), (("hiden",),), "size 'hiden'"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_where_it_is_written(kind, names, sizes, message):
    with pytest.raises(ValueError, match=message):
        Rule(kind, names, sizes)


def test_a_table_with_experts_needs_the_names_of_their_fields():
    family = FAMILIES["qwen3_moe"]
    with pytest.raises(ValueError, match="a table with experts needs"):
        Family("qwen3_moe", family.layer, family.problems, family.tiny_config)


def test_a_checkpoint_of_another_size_is_refused_on_every_rank(pool, tmp_path):
    """Last: a rank that raises ends the pool."""
    folder = write_model("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    # Layer 0 belongs to the first stage only; the last stage must refuse too.
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        RankFailure, match=r"model.layers.0.mlp.up_proj.weight is \[47, 32\], config.json makes it \[48, 32\]"
    ):
        pool.run("tests.weights.jobs:through_megatron", 2, str(folder), {"pipeline": 2})
