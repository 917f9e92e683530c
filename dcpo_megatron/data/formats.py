"""Rows to questions: where each known format keeps the prompt, the answer and the id.

| format | prompt | answer | id | data source |
|---|---|---|---|---|
| verl-parquet (or JSON lines) | prompt: messages or text | reward_model.ground_truth | extra_info.index | data_source |
| jsonl (or parquet) | prompt, question or problem | answer or ground_truth | id | data_source |
| gsm8k | question | answer, after ``####``, without commas | id, else content | data_source, else "gsm8k" |

The full id is "data source/id", so that files do not collide by accident. A row without a data source takes the name of
its file, without folder and suffix: the id stays while the file moves, and changes when it is renamed. An id by content
is the first 16 hex digits of the SHA-256 of the question (all messages but the system's): it stays while the words do.

Nothing is a ground truth that only stands for a missing one: null, NaN (also in JSON), a time that is none. Numbers are
texts as a person writes them: 2.0 is "2", 1e16 has all its digits, 1e-7 is "0.0000001"; a timestamp at midnight is a
date. The TEXT "nan" stays, since somebody wrote it, and is counted aloud. A prompt that is the JSON text of messages is
those messages.
"""

import hashlib
import json
import math
import re
from collections import Counter
from datetime import date
from decimal import Decimal
from typing import NamedTuple

from dcpo_megatron.data.errors import DataError, is_unicode
from dcpo_megatron.data.readers import Table

CONTENT = "content"  # as id_key: derive the id from the question's text
_WORDS_FOR_NOTHING = ("nan", "none", "null", "nat", "<na>")  # what a missing value becomes where a table is made text
_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|content)['"]\s*:""")


class Schema(NamedTuple):
    """Dotted paths into a row; the first that leads to a value counts. Empty ``ids`` means by content."""

    name: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    ids: tuple[str, ...]


class Question(NamedTuple):
    """One row, understood: chat messages of role and content, the ground truth, the full id, the data source."""

    id: str
    messages: list[dict[str, str]]
    ground_truth: str
    data_source: str


class BadRow(Exception):
    """A row that cannot be used: ``reason`` for the count, and a sentence that follows the row's place."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


SCHEMAS = {
    "verl-parquet": Schema("verl-parquet", ("prompt",), ("reward_model.ground_truth",), ("extra_info.index",)),
    "jsonl": Schema("jsonl", ("prompt", "question", "problem"), ("answer", "ground_truth"), ("id",)),
    "gsm8k": Schema("gsm8k", ("question",), ("answer",), ("id", CONTENT)),
}


def wanted_columns(*keys: str | None) -> set[str]:
    """The top-level columns that any format or one of the given dotted paths may need."""
    paths = {key for key in keys if key} | {"data_source"}
    for schema in SCHEMAS.values():
        paths.update(schema.prompts + schema.answers + schema.ids)
    return paths | {path.split(".")[0] for path in paths}


def find_schema(table: Table, name: str, prompt_key: str | None, answer_key: str | None, id_key: str | None) -> Schema:
    """The schema of a file: the named one, or for "auto" the one that its first row with an answer fits; the keys given
    override it.

    Raises DataError if the file has none of the columns for the prompt, the answer or the id.
    """
    schema = _guess(table) if name == "auto" else SCHEMAS[name]
    if prompt_key is not None:
        schema = schema._replace(prompts=(prompt_key,))
    if answer_key is not None:
        schema = schema._replace(answers=(answer_key,))
    if id_key is not None:
        schema = schema._replace(ids=(id_key,))
    if table.rows:
        for what, paths in (("prompt", schema.prompts), ("answer", schema.answers)):
            if not any(path in table.columns or path.split(".")[0] in table.columns for path in paths):
                raise DataError(
                    f"{table.path} has no {what} column {' or '.join(paths)}: set data.{what}_key to one of its"
                    f" columns, {', '.join(table.columns[:20])}"
                )
        if CONTENT not in schema.ids and not any(path.split(".")[0] in table.columns for path in schema.ids):
            raise DataError(f"{table.rows[0][0]} {_no_id(schema)}")
    return schema


def understand(row: dict, schema: Schema, file_stem: str, notes: Counter[str] | None = None) -> Question:
    """Reads one row; counts in ``notes`` what the reader of the file may want to know of it.

    Raises BadRow where the prompt, the answer or the id is missing or unusable.
    """
    prompt = _first(row, schema.prompts)
    written = _written_messages(prompt) if isinstance(prompt, str) else None
    messages = _messages(prompt if written is None else written, schema)
    ground_truth = _answer(_first(row, schema.answers), schema)
    row_id = _id(_first(row, [path for path in schema.ids if path != CONTENT]))
    if row_id is None and CONTENT in schema.ids:
        row_id = content_id(messages)
    if row_id is None:
        raise BadRow("no id", _no_id(schema))
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        source = "gsm8k" if schema.name == "gsm8k" else file_stem
    question = Question(f"{source}/{row_id}", messages, ground_truth, source)
    texts = [("a prompt", m[key]) for m in messages for key in ("role", "content")]
    for what, text in (("an id", question.id), ("an answer", ground_truth), *texts):
        if not is_unicode(text):
            raise BadRow("broken text", f"has {what} that is not valid Unicode ({text[:80]!a}): correct its text")
    if notes is not None and written is not None:
        notes["prompts that are the JSON text of messages, taken as messages"] += 1
    if notes is not None and ground_truth.lower() in _WORDS_FOR_NOTHING:
        notes["answers that are a word for a missing value, kept as text"] += 1
    return question


def content_id(messages: list[dict[str, str]]) -> str:
    """16 hex digits that depend on the words of the question alone: not on the file, the answer or the system
    prompt."""
    text = "\n\n".join(message["content"].strip() for message in messages if message["role"] != "system")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _guess(table: Table) -> Schema:
    answers = ("reward_model", *SCHEMAS["jsonl"].answers)
    first = next((row for _, row in table.rows if _first(row, answers) is not None), {})
    if isinstance(first.get("reward_model"), dict):
        return SCHEMAS["verl-parquet"]
    if isinstance(first.get("question"), str) and "####" in str(first.get("answer")):
        return SCHEMAS["gsm8k"]
    return SCHEMAS["jsonl"]


def _first(row: dict, paths: tuple[str, ...] | list[str]) -> object:
    for path in paths:
        value: object = row
        for part in [path] if path in row else path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # NaN, and a time that is none, are not equal to themselves.
        if value is not None and not (isinstance(value, (float, Decimal, date)) and value != value):
            return value
    return None


def _written_messages(text: str) -> list | None:
    """The messages whose JSON text a prompt is; None for a prompt. Raises BadRow for what begins like messages and is
    no JSON."""
    if not _LIKE_MESSAGES.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return None  # a question that begins with a piece of JSON
        raise BadRow(
            "broken messages",
            "has a prompt that begins like the text of messages and is not JSON: give a list of messages, or its JSON"
            " text",
        ) from None
    return value if isinstance(value, list) else [value]


def _messages(value: object, schema: Schema) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise BadRow(
            "no prompt",
            f"has no prompt at {' or '.join(schema.prompts)}: it must be text or messages of role and content",
        )
    if not any(message["content"].strip() for message in value if message["role"] != "system"):
        raise BadRow("empty prompt", f"has an empty prompt at {' or '.join(schema.prompts)}: give it a question")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _answer(value: object, schema: Schema) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = value.strip() if isinstance(value, str) else _in_writing(value)
    if schema.name == "gsm8k":
        _, _, text = text.rpartition("####") if "####" in text else ("", "", "")
        text = text.strip()
        if re.fullmatch(r"-?[\d,]+(\.\d+)?", text):
            text = text.replace(",", "")
    if not text:
        after = " after '####'" if schema.name == "gsm8k" else ""
        raise BadRow(
            "no answer", f"has no answer at {' or '.join(schema.answers)}{after}: add it or set data.answer_key"
        )
    return text


def _in_writing(value: object) -> str:
    """A number or a date as a person writes it; empty for anything else, also for what is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else Decimal(repr(value))
    if isinstance(value, Decimal):
        text = f"{value:f}" if value.is_finite() else ""
        value = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if value == "-0" else value
    if isinstance(value, (int, date)) and not isinstance(value, bool):
        return str(value).removesuffix(" 00:00:00")
    return ""


def _id(value: object) -> str | None:
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with gaps is read as floats
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return str(value).strip() or None


def _no_id(schema: Schema) -> str:
    where = "" if schema.ids == ("id",) else f" at {' or '.join(path for path in schema.ids if path != CONTENT)}"
    return f"has no id{where}: add one or set data.id_key={CONTENT} to derive it from the prompt's text"
