"""What the model gets to read for each template."""

import json

import pytest

from dcpo_megatron.data import PromptOptions, load_prompts
from dcpo_megatron.data.templates import QWEN_MATH_SYSTEM

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def _load(tmp_path, tokenizer, prompt=MESSAGES, **options):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": prompt, "answer": "4"}))
    return load_prompts([path], tokenizer, PromptOptions(**options)).prompts[0]


def _chatml(system, user="2+2?"):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def test_auto_is_chat_with_a_chat_template_and_plain_without(tmp_path, chat_tokenizer, plain_tokenizer):
    assert _load(tmp_path, chat_tokenizer).text == _chatml("Be brief.")
    assert _load(tmp_path, plain_tokenizer).text == "Be brief.\n\n2+2?"


@pytest.mark.parametrize("prompt", [MESSAGES, "2+2?"])
def test_qwen_math_is_the_papers_prompt_and_needs_no_chat_template(tmp_path, plain_tokenizer, chat_tokenizer, prompt):
    for tokenizer in (plain_tokenizer, chat_tokenizer):
        assert _load(tmp_path, tokenizer, prompt, template="qwen-math").text == _chatml(QWEN_MATH_SYSTEM)
    assert QWEN_MATH_SYSTEM == "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize("template", ["chat", "qwen-math"])
def test_a_system_prompt_replaces_the_rows_and_an_empty_one_removes_it(tmp_path, chat_tokenizer, template):
    assert _load(tmp_path, chat_tokenizer, template=template, system_prompt="New.").text == _chatml("New.")
    removed = _load(tmp_path, chat_tokenizer, template=template, system_prompt="").text
    assert removed == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_only_plain_text_gets_the_tokenizers_own_special_tokens(tmp_path, chat_tokenizer):
    start = chat_tokenizer.convert_tokens_to_ids("<|im_start|>")
    bos = chat_tokenizer.convert_tokens_to_ids("<|bos|>")
    assert _load(tmp_path, chat_tokenizer, template="chat").token_ids[0] == start
    assert _load(tmp_path, chat_tokenizer, template="qwen-math").token_ids[0] == start
    plain = _load(tmp_path, chat_tokenizer, template="plain")
    assert plain.token_ids[0] == bos
    assert len(plain.token_ids) == 1 + len(plain.text)


def test_the_template_does_not_change_the_id(tmp_path, chat_tokenizer):
    ids = {_load(tmp_path, chat_tokenizer, template=template).id for template in ("chat", "qwen-math", "plain")}
    assert ids == {"x/1"}
