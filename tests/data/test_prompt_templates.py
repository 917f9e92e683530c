"""What the model gets to read for each template."""

import json

import pytest
from tokenizers import normalizers, processors
from transformers import ByT5Tokenizer

from dcpo_megatron.data import DataError, PromptOptions, load_prompts
from dcpo_megatron.data.templates import QWEN_MATH_SYSTEM, turn_end
from tests.data.conftest import CHAT_TEMPLATE, make_tokenizer

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


@pytest.fixture(scope="module")
def wrapping_tokenizer():
    """Begins every text with <|bos|> and ends it with <|im_end|>, its end of text, as ``<bos> $A <eos>`` in
    tokenizer.json does."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    bos, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|bos|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", bos), ("<|im_end|>", end)]
    )
    return tokenizer


def test_no_token_is_appended_behind_a_prompt_and_bos_stays(tmp_path, wrapping_tokenizer):
    bos, end = (wrapping_tokenizer.convert_tokens_to_ids(token) for token in ("<|bos|>", "<|im_end|>"))
    assert wrapping_tokenizer("2+2?")["input_ids"][-1] == end
    found = _load(tmp_path, wrapping_tokenizer, "2+2?", template="plain")
    assert found.token_ids == (bos, *wrapping_tokenizer("2+2?", add_special_tokens=False)["input_ids"])
    for template in ("chat", "qwen-math"):
        found = _load(tmp_path, wrapping_tokenizer, template=template)
        assert wrapping_tokenizer.decode(found.token_ids) == found.text  # nothing in front, nothing behind


def test_what_the_text_itself_says_stays_and_bos_is_not_said_twice(tmp_path, wrapping_tokenizer):
    def tokens(text):
        found = _load(tmp_path, wrapping_tokenizer, text, template="plain").token_ids
        return wrapping_tokenizer.convert_ids_to_tokens(found)

    assert tokens("<|bos|>2") == ["<|bos|>", "2"]
    assert tokens("2<|im_end|>3<|im_end|>") == ["<|bos|>", "2", "<|im_end|>", "3", "<|im_end|>"]
    assert tokens("2<|bos|>") == ["<|bos|>", "2", "<|bos|>"]


def test_a_text_that_leaves_no_token_is_no_prompt_though_bos_would_be_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(DataError, match="has a prompt without tokens: give it a question"):
        _load(tmp_path, tokenizer, "~~~")
    assert len(_load(tmp_path, tokenizer, "~2", max_prompt_tokens=2).token_ids) == 2


def test_a_tokenizer_without_a_fast_half_and_without_bos(tmp_path):
    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    found = _load(tmp_path, tokenizer, "ab", template="plain").token_ids
    assert tokenizer.convert_ids_to_tokens(found) == ["a", "b"]


def test_the_token_that_ends_a_turn(chat_tokenizer, plain_tokenizer):
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end("chat", chat_tokenizer) == turn_end("qwen-math", plain_tokenizer) == end
    assert turn_end("plain", chat_tokenizer) is None


@pytest.mark.parametrize(
    ("chat_template", "end"),
    [
        # Turns end where the next one begins.
        ("{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|bos|>' }}{{ m.content }}{% endfor %}",
         "<|im_start|>"),
        # The last turn of the assistant ends otherwise than the others.
        ("{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '<|bos|>' }}{% endfor %}",
         "<|im_end|>"),
        ("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
    ],
)  # fmt: skip
def test_the_token_that_ends_a_turn_of_other_templates(chat_template, end):
    tokenizer = make_tokenizer(chat_template)
    assert turn_end("chat", tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_prompt_that_is_the_json_text_of_messages_is_those_messages(tmp_path, chat_tokenizer):
    meant = _load(tmp_path, chat_tokenizer, MESSAGES)
    for text in (json.dumps(MESSAGES), json.dumps(MESSAGES, indent=1) + "\n", json.dumps(MESSAGES[1])):
        found = _load(tmp_path, chat_tokenizer, text, system_prompt="Be brief.")
        assert (found.text, found.token_ids) == (meant.text, meant.token_ids)
    path = tmp_path / "y.jsonl"
    path.write_text(json.dumps({"prompt": json.dumps(MESSAGES), "answer": "4"}))
    found = load_prompts([path], chat_tokenizer, PromptOptions(id_key="content"))
    assert found.summary().endswith("; prompts that are the JSON text of messages, taken as messages: 1.")


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        '{"a": 1} is JSON. What is a?',
        '[{"role": "user", "content": "x"}] is JSON. Which role is it?',
        '[{"name": "x", "price": 3}]',
        "[role: user]",
    ],
)
def test_a_prompt_with_brackets_is_a_prompt(tmp_path, chat_tokenizer, text):
    assert _load(tmp_path, chat_tokenizer, text).text == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (str(MESSAGES), "broken messages"),
        (json.dumps(MESSAGES)[:-5], "broken messages"),
        ('[{"role": ' + "[" * 100_000, "broken messages"),
        ('[{"role": "user", "content": [{"type": "text", "text": "x"}]}]', "no prompt"),
        ('[{"role": "user"}]', "no prompt"),
    ],
)
def test_a_text_that_begins_like_messages_and_is_none_is_no_prompt(tmp_path, chat_tokenizer, text, reason):
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "prompt": p, "answer": "4"}) + "\n" for i, p in enumerate((text, "a")))
    )
    assert load_prompts([path], chat_tokenizer, PromptOptions(on_bad_row="skip")).skipped == {reason: 1}


def test_the_template_does_not_change_the_id(tmp_path, chat_tokenizer):
    ids = {_load(tmp_path, chat_tokenizer, template=template).id for template in ("chat", "qwen-math", "plain")}
    assert ids == {"x/1"}
