"""Every family computes the same in transformers and in Megatron-Core, from converted files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.logits import compare_logits
from dcpo_megatron.weights.to_megatron import HfToMegatron

IDS = [3, 41, 5, 99, 18, 60, 2, 7, 88, 100, 14, 14, 0, 51]


@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_within_1e_5(tmp_path, family, tied):
    make_model(family, str(tmp_path / "hf"), tie_word_embeddings=tied)
    run_job(HfToMegatron(str(tmp_path / "hf"), ParallelLayout()), tmp_path / "ours")
    found = compare_logits(tmp_path / "hf", tmp_path / "ours", IDS, device="cpu")
    assert found.worst <= 1e-5 < found.scale
    assert found.agree == 1.0


def test_one_weight_that_is_off_is_seen(tmp_path):
    make_model("qwen2", str(tmp_path / "hf"))
    run_job(HfToMegatron(str(tmp_path / "hf"), ParallelLayout()), tmp_path / "ours")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] += 0.5
    save_file(tensors, file, {"format": "pt"})
    assert compare_logits(tmp_path / "hf", tmp_path / "ours", IDS, device="cpu").worst > 1e-3


def test_a_weight_that_is_no_number_is_the_worst_of_all(tmp_path):
    make_model("qwen2", str(tmp_path / "hf"))
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    run_job(HfToMegatron(str(tmp_path / "hf"), ParallelLayout()), tmp_path / "ours")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    assert not compare_logits(tmp_path / "hf", tmp_path / "ours", IDS, device="cpu").worst <= 1e9


@pytest.mark.parametrize(("ids", "words"), [([], "at least one"), ([101], "from 0 to 100"), ([1] * 129, "129 tokens")])
def test_tokens_that_the_model_cannot_take_are_refused(tmp_path, ids, words):
    make_model("qwen2", str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=words):
        compare_logits(tmp_path / "hf", tmp_path / "hf", ids, device="cpu")
