"""Each input that cannot be used is refused in one sentence: what, where, and what to do."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from dcpo_megatron.data import DataError, PromptOptions, load_prompts

GOOD = {"id": 1, "prompt": "2+2=", "answer": "4"}


def _lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _refusal(files, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(files, tokenizer, PromptOptions(**options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_files(plain_tokenizer):
    assert _refusal([], plain_tokenizer) == "there are no data files: set data.files"


def test_a_missing_file(tmp_path, plain_tokenizer):
    path = tmp_path / "not_there.parquet"
    assert _refusal([path], plain_tokenizer).startswith(f"there is no file {path}: check data.files")


def test_a_directory(tmp_path, plain_tokenizer):
    assert _refusal([tmp_path], plain_tokenizer) == f"{tmp_path} is a directory: name the files in it"


def test_a_file_of_another_kind(tmp_path, plain_tokenizer):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n")
    assert _refusal([path], plain_tokenizer) == f"{path} ends in '.csv': only .parquet and .jsonl files are read"


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -100])
def test_a_truncated_parquet_file(tmp_path, plain_tokenizer, keep):
    path = tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 100), path)
    path.write_bytes(path.read_bytes()[:keep])
    expected = f"{path} is not a readable parquet file, it may be cut off: copy or download it again"
    assert _refusal([path], plain_tokenizer) == expected


def test_a_parquet_file_that_is_damaged_in_the_middle(tmp_path, plain_tokenizer):
    path = tmp_path / "damaged.parquet"
    rows = [GOOD | {"id": i, "prompt": f"{i * i}+1="} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = bytearray(path.read_bytes())
    data[4:3000] = b"\xff" * 2996
    path.write_bytes(bytes(data))
    assert "is not a readable parquet file" in _refusal([path], plain_tokenizer)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{not json}", "is not JSON"),
        (b"[1, 2]", "is a JSON list"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"id": 2, "seed": ' + b"7" * 5000 + b"}", "cannot be read (Exceeds the limit"),
        (b'{"id": 2, "more": ' + b'{"a": [' * 50_000, "is not JSON"),
        (b'{"id": 2, "prompt": "caf\xe9"}', "is not UTF-8 text"),
        ('{"id": 2}'.encode("utf-16"), "is not UTF-8 text"),
        ('{"id": 2}'.encode("utf-16-le"), "is not JSON"),
        (b'{"id": 2} {"id": 3}', "is not JSON"),
        (b"\xef\xbb\xbf7", "is a JSON int"),
        (b"null", "is a JSON NoneType"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, plain_tokenizer, line, problem):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    assert _refusal([path], plain_tokenizer).startswith(f"line 3 of {path} {problem}")


def test_a_mark_of_the_byte_order_is_no_line_and_no_error(tmp_path, plain_tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\xef\xbb\xbf\n \t\n")
    assert [prompt.id for prompt in load_prompts([path], plain_tokenizer).prompts] == ["x/1"]


def test_a_file_without_a_row_is_named(tmp_path, plain_tokenizer):
    empty, full = tmp_path / "empty.jsonl", _lines(tmp_path / "x.jsonl", GOOD)
    empty.write_bytes(b"\xef\xbb\xbf")
    assert _refusal([empty], plain_tokenizer).endswith(f"0 rows of 1 file; rows of {empty}: 0.")
    assert load_prompts([full, empty], plain_tokenizer).summary().endswith(f"2 files; rows of {empty}: 0.")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]).slice(0, 0), tmp_path / "empty.parquet")
    assert "empty.parquet: 0" in _refusal([tmp_path / "empty.parquet"], plain_tokenizer)


def _raw_texts(*values: bytes) -> pyarrow.Array:
    """A column of texts whose bytes nobody has looked at."""
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    return pyarrow.Array.from_buffers(
        pyarrow.string(), len(values), [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(values))]
    )


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("prompt", _raw_texts(b"2+2=", b"caf\xe9", b"3+3=")),
        ("id", _raw_texts(b"a", b"\xed\xa0\x80", b"c")),
        ("answer", pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))),
        ("answer", pyarrow.array([0, 5_000_000, 0], pyarrow.date32())),
        ("answer", pyarrow.array([1000, 1, 0], pyarrow.duration("ns"))),
    ],
)
def test_a_value_of_a_parquet_file_that_cannot_be_read(tmp_path, plain_tokenizer, name, column):
    columns = {
        "id": pyarrow.array(["a", "b", "c"]),
        "prompt": pyarrow.array(["1+1="] * 3),
        "answer": pyarrow.array(["2"] * 3),
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns | {name: column}), path)
    message = _refusal([path], plain_tokenizer, on_bad_row="skip")
    assert message.startswith(f"row 2 of {path}, column {name}, cannot be read (")


def test_a_missing_prompt_column_and_the_columns_there_are(tmp_path, plain_tokenizer):
    row = {"id": 1, "query": "2+2=", "answer": "4"}
    path = _lines(tmp_path / "x.jsonl", row)
    expected = (
        "has no prompt column prompt or question or problem: set data.prompt_key to one of its columns, id, query,"
        " answer"
    )
    assert _refusal([path], plain_tokenizer) == f"{path} {expected}"
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert _refusal([path], plain_tokenizer) == f"{path} {expected}"


def test_a_missing_answer_column(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", {"id": 1, "prompt": "2+2="})
    assert "has no answer column answer or ground_truth: set data.answer_key" in _refusal([path], plain_tokenizer)


def test_a_plain_file_without_ids(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", {"prompt": "2+2=", "answer": "4"})
    expected = "has no id: add one or set data.id_key=content to derive it from the prompt's text"
    assert _refusal([path], plain_tokenizer) == f"line 1 of {path} {expected}"
    assert _refusal([path], plain_tokenizer, on_bad_row="skip") == f"line 1 of {path} {expected}"


def test_one_row_without_an_id(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD, GOOD | {"id": 2}, GOOD | {"id": None})
    assert _refusal([path], plain_tokenizer).startswith(
        f"line 3 of {path} has no id: add one or set data.id_key=content"
    )


@pytest.mark.parametrize("bad_id", [True, 1.5, "", " ", {"a": 1}])
def test_an_id_that_is_neither_text_nor_a_whole_number(tmp_path, plain_tokenizer, bad_id):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"id": bad_id})
    assert "has no id" in _refusal([path], plain_tokenizer)


def test_a_row_without_an_answer(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD, GOOD | {"id": 2, "answer": "  "})
    assert (
        _refusal([path], plain_tokenizer)
        == f"line 2 of {path} has no answer at answer or ground_truth: add it or set data.answer_key, or set"
        " data.on_bad_row=skip"
    )


def test_a_gsm8k_row_without_its_mark(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", {"question": "a?", "answer": "#### 1"}, {"question": "b?", "answer": "2"})
    assert _refusal([path], plain_tokenizer).startswith(f"line 2 of {path} has no answer at answer after '####'")


@pytest.mark.parametrize("prompt", [5, [], [5], [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]])
def test_a_prompt_that_is_neither_text_nor_messages(tmp_path, plain_tokenizer, prompt):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"prompt": prompt})
    assert _refusal([path], plain_tokenizer).startswith(f"line 1 of {path} has ")


def test_a_prompt_with_a_system_message_only(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"prompt": [{"role": "system", "content": "Be brief."}]})
    assert _refusal([path], plain_tokenizer).startswith(f"line 1 of {path} has an empty prompt")


def test_a_prompt_that_is_too_long(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"prompt": "x" * 100})
    assert (
        _refusal([path], plain_tokenizer, max_prompt_tokens=100)
        == f"line 1 of {path} has a prompt of 101 tokens: raise data.max_prompt_tokens=100, or set data.on_bad_row=skip"
    )
    assert len(load_prompts([path], plain_tokenizer, PromptOptions(max_prompt_tokens=101)).prompts[0].token_ids) == 101


def test_messages_that_the_chat_template_refuses(tmp_path, chat_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"prompt": [{"role": "robot", "content": "2+2="}]})
    assert _refusal([path], chat_tokenizer).startswith(f"line 1 of {path} is refused by the chat template (no robots)")


def test_duplicate_ids_name_both_rows(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD, GOOD | {"id": 2}, GOOD)
    assert (
        _refusal([path], plain_tokenizer)
        == f"line 3 of {path} has the same id 'x/1' as line 1 of {path}: make the ids unique, or set "
        "data.on_duplicate_id=first to keep the first copy"
    )


@pytest.mark.parametrize("change", [{"prompt": "3+1="}, {"answer": "5"}, {"prompt": "3+3=", "answer": "6"}])
def test_one_id_for_two_questions_or_answers_is_refused_even_where_copies_are_allowed(
    tmp_path, plain_tokenizer, change
):
    path = _lines(tmp_path / "x.jsonl", GOOD, GOOD | change)
    message = _refusal([path], plain_tokenizer, on_duplicate_id="first", on_bad_row="skip")
    assert message.startswith(f"line 2 of {path} has the same id 'x/1' as line 1 of {path} but another question")


def test_nothing_left(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD | {"answer": ""})
    message = _refusal([path], plain_tokenizer, on_bad_row="skip")
    assert message == "no prompt is left: 0 prompts from 1 row of 1 file; left out 1: 1 no answer."
    (tmp_path / "empty.jsonl").touch()
    assert _refusal([tmp_path / "empty.jsonl"], plain_tokenizer).startswith("no prompt is left")


def test_a_chat_template_that_the_tokenizer_does_not_have(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD)
    message = _refusal([path], plain_tokenizer, template="chat")
    assert message == "the tokenizer has no chat template: set data.template to qwen-math or plain"


@pytest.mark.parametrize(
    "option",
    [
        {"format": "csv"},
        {"template": "alpaca"},
        {"on_bad_row": "ignore"},
        {"on_duplicate_id": "last"},
        {"limit": 0},
        {"max_prompt_tokens": -1},
    ],
)
def test_options_out_of_range(option):
    with pytest.raises(DataError, match=f"data.{next(iter(option))} is .*: it must be"):
        PromptOptions(**option)


def test_the_smallest_options_in_range(tmp_path, plain_tokenizer):
    path = _lines(tmp_path / "x.jsonl", GOOD, GOOD | {"id": 2})
    assert [p.id for p in load_prompts([path], plain_tokenizer, PromptOptions(limit=1)).prompts] == ["x/1"]
    assert "of 5 tokens: raise data.max_prompt_tokens=1" in _refusal([path], plain_tokenizer, max_prompt_tokens=1)
