"""Prompts are read from the formats others already have, each under an id that stays; the real files give known
counts."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from dcpo_megatron.data import DataError, PromptOptions, load_prompts
from dcpo_megatron.data.templates import QWEN_MATH_SYSTEM


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _verl(index, question="1+1?", answer="2", **more):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return {"prompt": messages, "reward_model": {"ground_truth": answer}, "extra_info": {"index": index}, **more}


def _write_parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_math500_gives_500_prompts(real_data, chat_tokenizer):
    found = load_prompts([real_data / "math500.parquet"], chat_tokenizer)
    assert len(found) == len({prompt.id for prompt in found.prompts}) == 500
    assert found.summary() == "500 prompts from 500 rows of 1 file."
    first = found.prompts[0]
    assert first.id == "qwen_math500/math500_test/precalculus/807.json"
    assert first.ground_truth == r"\left( 3, \frac{\pi}{2} \right)"
    assert first.text.startswith(
        f"<|im_start|>system\n{QWEN_MATH_SYSTEM}<|im_end|>\n<|im_start|>user\nConvert the point"
    )
    assert first.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chat_tokenizer.decode(first.token_ids) == first.text


@pytest.mark.parametrize(
    ("name", "rows", "count"), [("amc2023", 1280, 40), ("aime_2024", 960, 30), ("aime_2025", 960, 30)]
)
def test_repeated_problems_are_an_error_unless_the_first_copy_is_asked_for(
    real_data, plain_tokenizer, name, rows, count
):
    file = real_data / f"{name}.parquet"
    with pytest.raises(
        DataError, match=rf"row \d+ of .*{name}.parquet has the same id '.*' as row \d+ of .*: make the ids"
    ):
        load_prompts([file], plain_tokenizer)
    found = load_prompts([file], plain_tokenizer, PromptOptions(on_duplicate_id="first"))
    assert (len(found), found.rows) == (count, rows)
    assert (
        found.summary() == f"{count} prompts from {rows:,} rows of 1 file; left out {rows - count:,}: "
        f"{rows - count:,} copies of an id already read."
    )


@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_gsm8k_gives_all_prompts_with_numbers_as_answers(real_data, plain_tokenizer, name, count):
    found = load_prompts([real_data / f"{name}.jsonl"], plain_tokenizer)
    assert len(found) == count
    assert all(prompt.ground_truth.lstrip("-").isdigit() for prompt in found.prompts)
    assert all(prompt.id.startswith("gsm8k/") and len(prompt.id) == 6 + 16 for prompt in found.prompts)


def test_all_real_files_load_together_without_a_collision(real_data, plain_tokenizer):
    names = ["math500.parquet", "aime_2024.parquet", "aime_2025.parquet", "amc2023.parquet", "gsm8k_test.jsonl"]
    found = load_prompts([real_data / name for name in names], plain_tokenizer, PromptOptions(on_duplicate_id="first"))
    assert len(found) == 500 + 30 + 30 + 40 + 1319


def test_gsm8k_answers_lose_their_commas_and_ids_are_the_hash_of_the_question(tmp_path, plain_tokenizer):
    rows = [{"question": "How much?", "answer": "Much.\n#### 1,234"}, {"question": "Less?", "answer": "#### -3"}]
    rows += [{"question": "Cents?", "answer": "#### 1,234.50"}, {"question": "Both?", "answer": "#### 1,2 or 3"}]
    found = load_prompts([_write(tmp_path / "any_name.jsonl", *rows)], plain_tokenizer)
    assert [prompt.ground_truth for prompt in found.prompts] == ["1234", "-3", "1234.50", "1,2 or 3"]
    assert found.prompts[0].id == "gsm8k/06a1ee61a3f25ce6"  # for ever: histories of rewards are kept under it


def test_verl_rows_are_the_same_prompts_from_parquet_and_from_json_lines(tmp_path, chat_tokenizer):
    rows = [_verl(i, f"{i}+1?", str(i + 1), data_source="adds") for i in range(5)]
    parquet = load_prompts([_write_parquet(tmp_path / "a.parquet", *rows)], chat_tokenizer)
    lines = load_prompts([_write(tmp_path / "b.jsonl", *rows)], chat_tokenizer)
    assert parquet.prompts == lines.prompts
    assert parquet.prompts[3].id == "adds/3"
    assert parquet.fingerprint() == lines.fingerprint()


def test_a_verl_prompt_may_be_plain_text_and_answers_and_ids_may_be_numbers(tmp_path, plain_tokenizer):
    rows = [{"prompt": "2+2=", "reward_model": {"ground_truth": 4}, "extra_info": {"index": 7.0}}]
    found = load_prompts([_write_parquet(tmp_path / "sums.parquet", *rows)], plain_tokenizer)
    assert (found.prompts[0].id, found.prompts[0].ground_truth, found.prompts[0].text) == ("sums/7", "4", "2+2=")


@pytest.mark.parametrize("prompt_name", ["prompt", "question", "problem"])
@pytest.mark.parametrize("answer_name", ["answer", "ground_truth"])
def test_plain_json_lines_are_read_by_their_usual_names(tmp_path, plain_tokenizer, prompt_name, answer_name):
    file = _write(tmp_path / "mine.jsonl", {"id": "a", prompt_name: "2+2=", answer_name: "4"})
    prompt = load_prompts([file], plain_tokenizer).prompts[0]
    assert (prompt.id, prompt.text, prompt.ground_truth, prompt.data_source) == ("mine/a", "2+2=", "4", "mine")


def test_keys_given_as_dotted_paths_win_over_the_format(tmp_path, plain_tokenizer):
    file = _write(tmp_path / "x.jsonl", {"task": {"q": "2+2=", "a": ["4"]}, "meta": {"uid": 9}, "prompt": "other"})
    options = PromptOptions(prompt_key="task.q", answer_key="task.a", id_key="meta.uid")
    prompt = load_prompts([file], plain_tokenizer, options).prompts[0]
    assert (prompt.id, prompt.text, prompt.ground_truth) == ("x/9", "2+2=", "4")
    rows = [{"task": {"q": "2+2=", "a": "4"}, "meta": {"uid": 9}, "prompt": "other"}]
    assert load_prompts([_write_parquet(tmp_path / "x.parquet", *rows)], plain_tokenizer, options).prompts[0] == prompt


def test_an_id_by_content_depends_on_the_question_alone(tmp_path, plain_tokenizer):
    options = PromptOptions(id_key="content")
    text = load_prompts([_write(tmp_path / "s.jsonl", {"prompt": "2+2=", "answer": "4"})], plain_tokenizer, options)
    other = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2="}]
    chat = load_prompts([_write(tmp_path / "s.jsonl", {"prompt": other, "answer": "four"})], plain_tokenizer, options)
    assert text.prompts[0].id == chat.prompts[0].id
    assert text.prompts[0].text != chat.prompts[0].text


def test_an_id_stays_when_the_file_moves_and_files_with_equal_ids_do_not_collide(tmp_path, plain_tokenizer):
    row = {"id": 1, "prompt": "2+2=", "answer": "4"}
    (tmp_path / "folder").mkdir()
    first, second = _write(tmp_path / "a.jsonl", row), _write(tmp_path / "b.jsonl", row)
    moved = shutil.copy(first, tmp_path / "folder" / "a.jsonl")
    assert load_prompts([moved], plain_tokenizer).prompts == load_prompts([first], plain_tokenizer).prompts
    assert [p.id for p in load_prompts([first, second], plain_tokenizer).prompts] == ["a/1", "b/1"]


def test_a_limit_stops_after_so_many_prompts(real_data, plain_tokenizer):
    options = PromptOptions(on_duplicate_id="first", limit=5)
    found = load_prompts([real_data / "amc2023.parquet"], plain_tokenizer, options)
    assert len(found) == 5
    assert found.rows == 5 + found.skipped.total()


@pytest.mark.parametrize("source", ["", None, 3])
def test_a_row_without_a_data_source_takes_the_name_of_its_file(tmp_path, plain_tokenizer, source):
    row = {"id": 1, "prompt": "2+2=", "answer": "4", "data_source": source}
    (prompt,) = load_prompts([_write(tmp_path / "mine.jsonl", row)], plain_tokenizer).prompts
    assert (prompt.id, prompt.data_source) == ("mine/1", "mine")


def test_what_is_skipped_is_counted_by_reason_and_told(tmp_path, plain_tokenizer):
    good = {"id": 0, "prompt": "2+2=", "answer": "4"}
    rows = [good, good | {"id": 1, "answer": ""}, good | {"id": None}, good | {"id": 3, "prompt": "long " * 50}]
    rows += [{"id": 4, "answer": "4"}, good | {"id": 5, "prompt": "  "}, good | {"id": 6, "answer": None}]
    rows += [good | {"id": 7, "prompt": "\ud800"}]
    options = PromptOptions(on_bad_row="skip", max_prompt_tokens=20)
    found = load_prompts([_write(tmp_path / "x.jsonl", *rows)], plain_tokenizer, options)
    assert [prompt.id for prompt in found.prompts] == ["x/0"]
    assert found.skipped == {
        "no answer": 2, "no id": 1, "longer than max_prompt_tokens": 1, "no prompt": 1, "empty prompt": 1,
        "broken text": 1
    }  # fmt: skip
    assert found.rows == len(found) + found.skipped.total()
    assert found.summary().startswith("1 prompt from 8 rows of 1 file; left out 7: 2 no answer, 1 ")
