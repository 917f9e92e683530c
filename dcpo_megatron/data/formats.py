"""Rows to questions: where each known format keeps the prompt, the answer and the id.

| format | prompt | answer | id | data source |
|---|---|---|---|---|
| verl-parquet (also as JSON lines) | prompt: chat messages or text | reward_model.ground_truth | extra_info.index | data_source |
| jsonl (also as parquet) | prompt, question or problem | answer or ground_truth | id | data_source |
| gsm8k | question | answer, after ``####``, without commas | id, else content | data_source, else "gsm8k" |

The full id is "data source/id", so that files do not collide by accident. A row without a data source takes the name of its
file, without folder and suffix: the id stays while the file moves, and changes when it is renamed. An id by content is the
first 16 hex digits of the SHA-256 of the question (all messages but the system's): it stays while the words do.
"""

import hashlib
import math
import re
from typing import NamedTuple

from dcpo_megatron.data.errors import DataError
from dcpo_megatron.data.readers import Table

CONTENT = "content"  # as id_key: derive the id from the question's text


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
    """The schema of a file: the named one, or for "auto" the one that its first row fits; the keys given override it.

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
                    f"{table.path} has no {what} column {' or '.join(paths)}: set data.{what}_key to one of its columns, "
                    f"{', '.join(table.columns[:20])}"
                )
        if CONTENT not in schema.ids and not any(path.split(".")[0] in table.columns for path in schema.ids):
            raise DataError(f"{table.rows[0][0]} {_no_id(schema)}")
    return schema


def understand(row: dict, schema: Schema, file_stem: str) -> Question:
    """Reads one row. Raises BadRow where the prompt, the answer or the id is missing or unusable."""
    messages = _messages(_first(row, schema.prompts), schema)
    ground_truth = _answer(_first(row, schema.answers), schema)
    row_id = _id(_first(row, [path for path in schema.ids if path != CONTENT]))
    if row_id is None and CONTENT in schema.ids:
        row_id = content_id(messages)
    if row_id is None:
        raise BadRow("no id", _no_id(schema))
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        source = "gsm8k" if schema.name == "gsm8k" else file_stem
    return Question(f"{source}/{row_id}", messages, ground_truth, source)


def content_id(messages: list[dict[str, str]]) -> str:
    """16 hex digits that depend on the words of the question alone: not on the file, the answer or the system prompt."""
    text = "\n\n".join(message["content"].strip() for message in messages if message["role"] != "system")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _guess(table: Table) -> Schema:
    first = table.rows[0][1] if table.rows else {}
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
        if value is not None:
            return value
    return None


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
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    text = value.strip() if isinstance(value, str) else ""
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


def _id(value: object) -> str | None:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as floats
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return str(value).strip() or None


def _no_id(schema: Schema) -> str:
    where = "" if schema.ids == ("id",) else f" at {' or '.join(path for path in schema.ids if path != CONTENT)}"
    return f"has no id{where}: add one or set data.id_key={CONTENT} to derive it from the prompt's text"
