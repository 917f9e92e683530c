"""The demo on a model that exists, here a tiny one of the real one's kind: 9 heads of 3 groups, tied embeddings, a rope
base of its own, ChatML with a system message of its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.cli import demo, demo_pretrained
from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.training.checks import check_run
from dcpo_megatron.training.tokenizer import load_tokenizer, stop_token_ids
from dcpo_megatron.weights.from_gguf import check_gguf, end_as_the_model_does
from dcpo_megatron.weights.hf_folder import CheckpointError
from tests.training.test_run_end_to_end import launch

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe"
    " brief<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tiny")
    # As transformers reads it from GGUF: the token that opens a turn, in the place of the one that ends it.
    tokenizer.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], bos_token=SPECIAL[1])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=36, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=4, tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    end_as_the_model_does(folder)
    return folder


def test_a_response_ends_where_the_model_ends_it_and_a_turns_opening_is_one_token(tiny):
    tokenizer = load_tokenizer(str(tiny), 259)
    assert stop_token_ids(str(tiny), tokenizer) == (2,)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7+5"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.startswith("<|im_start|>system\nBe brief<|im_end|>\n") and ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode([*tokenizer("12")["input_ids"], 2], skip_special_tokens=True) == "12"


def test_from_the_model_to_the_page_of_its_responses(tiny, tmp_path):
    words = [
        "--pretrained", str(tiny), "--output", str(tmp_path / "run"), "--ranks", "1", "rollout.max_response_tokens=12",
        "data.max_prompt_tokens=400", "training.steps=10", "optimizer.lr=1e-2", "evaluation.limit=2",
        "logging.samples=0",
        "reward.function=tests.training.rewards:digits", "reward.correct_at=0.5",
    ]  # fmt: skip
    done = launch([sys.executable, "-m", "dcpo_megatron.cli", "demo", *words])
    said = done.stdout
    assert done.returncode in (0, 1), said + done.stderr
    assert "largest difference of a logit" in said and "20 tensors, 30,240 numbers, the same bit for bit" in said
    assert "mean reward" in said and done.returncode == ("NOT above" in said)
    page = (tmp_path / "run" / "responses.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 1 + 2 * demo_pretrained.SHOWN
    assert "3 + 4 = 7. Answer: 7" in page and "temperature 1 with" in page
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10


def test_one_bit_of_one_tensor_is_found(tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    assert demo_pretrained.compare_weights(tiny, other)[0] == 20
    tensors = load_file(other / "model.safetensors")
    bits = tensors["model.norm.weight"].view(torch.int32)
    bits[3] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(demo_pretrained.DemoError, match=r"model\.norm\.weight .* is not that of"):
        demo_pretrained.compare_weights(tiny, other)


def test_the_standard_error_is_that_of_two_means():
    first, last, error = demo_pretrained.rise([0.0, 0.2, 0.4, 0.2, 0.2, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert (first, last) == pytest.approx((0.2, 1.0))
    assert error == pytest.approx((0.02 / 5) ** 0.5)


def test_gsm8k_questions_become_conversations_with_the_worked_example(tmp_path):
    for name in demo_pretrained.GSM8K.values():
        (tmp_path / name).write_text(json.dumps({"question": "How many?", "answer": "2*500\n#### 1,000"}) + "\n")
    (row,) = demo_pretrained._problems("train", 0, str(tmp_path))
    assert row["answer"] == "1000" and row["prompt"] == [{"role": "user", "content": "How many?"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "somewhere"], "--data is for --pretrained"),
        (["--pretrained", "{tiny}", "--data", "nowhere"], "nowhere has no gsm8k_train.jsonl"),
        (["--pretrained", "nowhere"], "nowhere cannot be read"),
        (["--pretrained", "{tiny}/config.json"], "is not a GGUF file"),
        (["--pretrained", "{folder}"], "has no config.json"),
        (["--pretrained", "{tiny}", "training.steps=9"], "so 10 are needed"),
        (["--pretrained", "{tiny}", "model.weights=x"], "the demo's own to set"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(words, message, tiny, tmp_path, capsys):
    words = [word.format(tiny=tiny, folder=tmp_path) for word in words]
    assert demo.main([*words, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import importlib.util

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="packages gguf and accelerate"):
        check_gguf(tmp_path / "model.gguf")


def test_tensor_ranks_that_do_not_divide_nine_heads_are_refused(tiny):
    words = [f"model.path={tiny}", "data.files=[x.jsonl]", "parallel.tensor=2", "training.platform=cpu"]
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 does not divide the model's 9 attention heads"):
        check_run(load_config([], words), 2)
