"""A ground truth is what a person would write; what only stands for a missing one is none, whatever its column's
type."""

import datetime
import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from dcpo_megatron.data import DataError, PromptOptions, load_prompts

NAN = float("nan")


def _parquet(path, answers: pyarrow.Array, name="answer"):
    """One row an answer; ids count from 0."""
    columns = {"id": list(range(len(answers))), "prompt": [f"{i}+0=" for i in range(len(answers))], name: answers}
    if name == "reward_model":
        columns["extra_info"] = [{"index": i} for i in columns.pop("id")]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _answers(path, tokenizer) -> tuple[list[str], int]:
    """Ground truths, and how many rows were left out for want of one."""
    found = load_prompts([path], tokenizer, PromptOptions(on_bad_row="skip"))
    assert set(found.skipped) <= {"no answer"} and found.rows == len(found) + found.skipped.total()
    return [prompt.ground_truth for prompt in found.prompts], found.skipped["no answer"]


@pytest.mark.parametrize(
    ("answers", "type_", "wanted"),
    [
        ([2.0, NAN, 6.0], None, ["2", "6"]),
        ([None, -3.0, -0.0, 0.5, 1e16, 1e22, 1e-7, 2.5e300], None,
         ["-3", "0", "0.5", "1" + "0" * 16, "1" + "0" * 22, "0.0000001", str(int(2.5e300))]),
        ([float("inf"), float("-inf"), 123456789012345680.0], None, ["123456789012345680"]),
        ([0.1, 12.0, None, NAN], pyarrow.float32(), ["0.1", "12"]),
        ([7, None, 2**62], pyarrow.int64(), ["7", str(2**62)]),
        ([Decimal("2.00"), None, Decimal("-1.50"), Decimal("100"), Decimal("-0.00")], pyarrow.decimal128(9, 2),
         ["2", "-1.5", "100", "0"]),
        ([Decimal("1" * 60), None], pyarrow.decimal256(70, 3), ["1" * 60]),
        ([datetime.date(2024, 2, 29), None], None, ["2024-02-29"]),
        ([datetime.datetime(2024, 2, 29), None, datetime.datetime(2024, 2, 29, 13, 5)], pyarrow.timestamp("us"),
         ["2024-02-29", "2024-02-29 13:05:00"]),
        ([0, None], pyarrow.timestamp("ns"), ["1970-01-01"]),
        ([[4.0], [NAN], [None], None, []], None, ["4"]),
        (["nine", None], pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["nine"]),
    ],
)  # fmt: skip
def test_a_missing_answer_is_left_out_and_numbers_are_written_in_full(
    tmp_path, plain_tokenizer, answers, type_, wanted
):
    path = _parquet(tmp_path / "x.parquet", pyarrow.array(answers, type_))
    assert _answers(path, plain_tokenizer) == (wanted, len(answers) - len(wanted))


@pytest.mark.parametrize("type_", [pyarrow.float64(), pyarrow.float32()])
def test_the_same_within_a_struct_also_where_the_first_row_has_none(tmp_path, plain_tokenizer, type_):
    rows = [None, {"ground_truth": None}, {"ground_truth": NAN}, {"ground_truth": 8.0}, {"ground_truth": 0.3}]
    array = pyarrow.array(rows, pyarrow.struct([("ground_truth", type_), ("style", pyarrow.string())]))
    assert _answers(_parquet(tmp_path / "x.parquet", array, "reward_model"), plain_tokenizer) == (["8", "0.3"], 3)


def test_json_has_nan_too_and_the_next_column_that_holds_an_answer_counts(tmp_path, plain_tokenizer):
    lines = [
        '{"id": 1, "prompt": "1+1=", "answer": NaN}',
        '{"id": 2, "prompt": "1+2=", "answer": NaN, "ground_truth": 3.0}',
        '{"id": 3, "prompt": "1+3=", "answer": 1e400}',
        '{"id": 4, "prompt": "1+4=", "answer": -Infinity}',
        '{"id": 5, "prompt": "1+5=", "answer": 6e0}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert _answers(tmp_path / "x.jsonl", plain_tokenizer) == (["3", "6"], 3)
    verl = '{"prompt": "1+1=", "reward_model": {"ground_truth": %s}, "extra_info": {"index": %d}}\n'
    (tmp_path / "v.jsonl").write_text(verl % ("NaN", 0) + verl % ("2.0", 1) + verl % ("null", 2))
    assert _answers(tmp_path / "v.jsonl", plain_tokenizer) == (["2"], 2)


def test_a_file_of_gsm8k_is_known_by_its_first_answer_not_by_a_missing_one(tmp_path, plain_tokenizer):
    rows = [{"question": "a?", "answer": None}, {"question": "b?", "answer": "So.\n#### 1,200"}]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _answers(tmp_path / "g.jsonl", plain_tokenizer) == (["1200"], 1)


def test_a_missing_answer_stops_the_run_where_bad_rows_are_errors(tmp_path, plain_tokenizer):
    path = _parquet(tmp_path / "x.parquet", pyarrow.array([1.0, NAN]))
    with pytest.raises(DataError, match=r"^row 2 of .*x.parquet has no answer at answer or ground_truth"):
        load_prompts([path], plain_tokenizer)


def test_the_word_nan_in_a_column_of_texts_is_what_somebody_wrote_and_is_said_aloud(tmp_path, plain_tokenizer):
    path = _parquet(tmp_path / "x.parquet", pyarrow.array(["nan", "None", "4", "a naan"]))
    found = load_prompts([path], plain_tokenizer)
    assert [prompt.ground_truth for prompt in found.prompts] == ["nan", "None", "4", "a naan"]
    assert found.summary().endswith("; answers that are a word for a missing value, kept as text: 2.")


def test_ids_of_whole_decimals_are_whole_numbers(tmp_path, plain_tokenizer):
    columns = {"id": [Decimal("7"), Decimal("8.5"), None], "prompt": ["1+1="] * 3, "answer": ["2"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    found = load_prompts([tmp_path / "x.parquet"], plain_tokenizer, PromptOptions(on_bad_row="skip"))
    assert [prompt.id for prompt in found.prompts] == ["x/7"] and found.skipped == {"no id": 2}
