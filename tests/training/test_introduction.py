"""What a run says of its first prompt and of what ends a response is what the model reads and what the engines are
told."""

import io
import json
import sys

import pytest

from dcpo_megatron.checkpoint.resume import changed_keys
from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.console.quiet import write_any_letter
from dcpo_megatron.data import Prompt, PromptOptions, load_prompts
from dcpo_megatron.monitor.sinks import Sinks
from dcpo_megatron.rollout import GenerateRequest, SamplingParams
from dcpo_megatron.rollout.server_answers import batches_of, body
from dcpo_megatron.training.introduction import introduce
from dcpo_megatron.training.tokenizer import stop_token_ids
from tests.data.conftest import CHAT_TEMPLATE, make_tokenizer

BOS, START, END = 256, 257, 258


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHAT_TEMPLATE)


def said(tokenizer, prompt, stops=(END,), template="auto") -> list[str]:
    return introduce(prompt, tokenizer, stops, template, "key=[{}]")


def load(tmp_path, tokenizer, text, **options) -> Prompt:
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "prompt": text, "answer": "4"}))
    return load_prompts([tmp_path / "x.jsonl"], tokenizer, PromptOptions(**options)).prompts[0]


def test_the_first_prompt_is_shown_with_its_special_tokens_and_what_ends_a_response(tmp_path, tokenizer):
    assert said(tokenizer, load(tmp_path, tokenizer, "2+2 = ?")) == [
        "first prompt, x/1, 26 tokens:",
        "  | <|im_start|>user",
        "  | 2+2 = ?<|im_end|>",
        "  | <|im_start|>assistant",
        "  | ",
        "a response ends with <|im_end|> (258)",
    ]
    plain = said(tokenizer, load(tmp_path, tokenizer, "2+2", template="plain"), template="plain")
    assert plain[1:] == ["  | <|bos|>2+2", "a response ends with <|im_end|> (258)"]


@pytest.mark.parametrize("template", ["auto", "chat", "qwen-math"])
def test_a_turn_that_ends_with_another_token_than_a_response_is_told_with_what_to_do(tmp_path, tokenizer, template):
    prompt = load(tmp_path, tokenizer, "2+2", template=template)
    *_, ends, odd = said(tokenizer, prompt, (BOS, START), template)
    assert ends == "a response ends with <|bos|> (256) or <|im_start|> (257)"
    name = "chat" if template == "auto" else template
    assert odd.startswith(f"template {name} ends a turn with <|im_end|> (258), which does not end a response: ")
    assert odd.endswith("set key=[258]")
    assert not [line for line in said(tokenizer, prompt, (BOS, END), template) if "which does not" in line]


def test_a_prompt_that_ends_as_a_response_does_is_told(tmp_path, tokenizer):
    prompt = load(tmp_path, tokenizer, "2+2<|im_end|>", template="plain")
    assert said(tokenizer, prompt, template="plain")[-1].startswith("the prompt ends with <|im_end|> (258)")
    assert "the prompt ends" not in said(tokenizer, prompt, (BOS,), "plain")[-1]


def test_what_a_terminal_would_obey_or_hide_is_shown_and_a_long_prompt_is_cut(tmp_path, tokenizer):
    prompt = load(tmp_path, tokenizer, "a\x1b[2J\tb\u200b\nc", template="plain")
    assert said(tokenizer, prompt, template="plain")[1:3] == ["  | <|bos|>a\\x1b[2J\\tb\\u200b", "  | c"]
    text = "".join(said(tokenizer, load(tmp_path, tokenizer, "x" * 5000 + "end", template="plain"), template="plain"))
    assert "[... 2,010 characters ...]" in text and "xend" in text and len(text) < 3200


@pytest.mark.parametrize("console", [True, False])
def test_a_prompt_reaches_the_console_as_it_is_also_one_without_its_letters(tmp_path, monkeypatch, console):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    write_any_letter()
    settings = ["model.path=m", "data.files=[x]", "logging.tensorboard=false", f"logging.console={console}"]
    sinks = Sinks(load_config([], settings), tmp_path, True, 1)
    sinks.announce("  | [bold]2[/bold] :smile: \u7ea2")
    sinks.close()
    assert out.buffer.getvalue() == b"  | [bold]2[/bold] :smile: \\u7ea2\n"


def test_tokens_that_end_a_response_are_the_models_and_those_given(demo_start, tmp_path, tokenizer):
    assert stop_token_ids(str(demo_start), tokenizer) == (0, END)
    assert stop_token_ids(str(demo_start), tokenizer, [7, 0, 3]) == (0, 3, 7, END)
    without = make_tokenizer()
    without.eos_token = None
    assert stop_token_ids(str(tmp_path), without, [5]) == (5,)
    with pytest.raises(ConfigError, match=r"or rollout\.stop_token_ids"):
        stop_token_ids(str(tmp_path), without)


def test_servers_are_told_every_token_that_ends_a_response():
    requests = [GenerateRequest((1, 2), seed) for seed in range(2)]
    (batch,) = batches_of(requests)
    posted = body(batch, requests, SamplingParams(4, stop_token_ids=(3, 7, END)), {}, ["a", "b"])["sampling_params"]
    assert [(p["stop_token_ids"], p["ignore_eos"]) for p in posted] == [([3, 7, END], False)] * 2


def test_a_key_that_a_checkpoint_is_too_old_to_name_counts_as_its_default():
    saved = load_config([], ["model.path=m", "data.files=[x]"]).model_dump(mode="json")
    now = load_config([], ["model.path=m", "data.files=[x]", "rollout.stop_token_ids=[5]"]).model_dump(mode="json")
    assert changed_keys(saved, now) == {"rollout.stop_token_ids": ([], [5])}
    del saved["rollout"]["stop_token_ids"]
    assert changed_keys(saved, now) == {"rollout.stop_token_ids": ([], [5])}
    now["rollout"]["stop_token_ids"] = []
    assert changed_keys(saved, now) == {}
