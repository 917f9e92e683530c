"""A text that cannot be written as UTF-8 never reaches a run: its row is left out and counted, or refused at the
start."""

import json
import os

import pytest

from dcpo_megatron.data import DataError, PromptOptions, load_prompts

GOOD = {"id": "whole", "prompt": "9+9=", "answer": "18", "data_source": "sums"}
HALF = "cut \ud835"


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"id": HALF}, "an id"),
        ({"id": "low half \udc00 alone"}, "an id"),
        ({"data_source": "\udfff"}, "an id"),
        ({"answer": "18\ud800"}, "an answer"),
        ({"prompt": "9+9\udcff="}, "a prompt"),
        ({"prompt": [{"role": "user", "content": "9+9="}, {"role": HALF, "content": "?"}]}, "a prompt"),
        ({"prompt": [{"role": "system", "content": HALF}, {"role": "user", "content": "9+9="}]}, "a prompt"),
    ],
)
def test_half_of_a_surrogate_pair_anywhere_in_a_row(tmp_path, plain_tokenizer, bad, what):
    path = _write(tmp_path / "x.jsonl", GOOD | {"id": "other"} | bad, GOOD)
    found = load_prompts([path], plain_tokenizer, PromptOptions(on_bad_row="skip"))
    assert [prompt.id for prompt in found.prompts] == ["sums/whole"] and found.skipped == {"broken text": 1}
    with pytest.raises(DataError, match=f"^line 1 of .* has {what} that is not valid Unicode") as caught:
        load_prompts([path], plain_tokenizer)
    str(caught.value).encode()  # the sentence itself can be written


def test_a_whole_pair_is_a_letter(tmp_path, plain_tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "\\ud835\\udc00", "prompt": "9+9=", "answer": "18"}')
    assert load_prompts([path], plain_tokenizer).prompts[0].id == "x/\U0001d400"


def test_a_file_whose_name_is_of_other_bytes(tmp_path, plain_tokenizer):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "w") as file:
        file.write(json.dumps(GOOD))
    with pytest.raises(DataError, match=r"^the file name '.*caf\\udce9.jsonl' is not valid Unicode.*: rename the file"):
        load_prompts([os.fsdecode(path)], plain_tokenizer)


def test_a_system_prompt():
    with pytest.raises(DataError, match=r"^data.system_prompt is .* valid Unicode"):
        PromptOptions(system_prompt=HALF)
