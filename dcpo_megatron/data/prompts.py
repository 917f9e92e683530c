"""Loading prompts: files to a list of ``Prompt``, each with an id that never changes, and a count of what was left out.

    file --readers--> rows --formats--> questions --templates--> text --tokenizer--> Prompt

A prompt without a stable id is refused, because the history of its rewards is kept under that id. Nothing is dropped in
silence: ``PromptSet.summary`` says how many rows were left out, and why.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcpo_megatron.data.errors import DataError, is_unicode
from dcpo_megatron.data.formats import SCHEMAS, BadRow, Question, find_schema, understand, wanted_columns
from dcpo_megatron.data.readers import read_table
from dcpo_megatron.data.templates import TEMPLATES, choose_template, render, tokenise


@dataclass(frozen=True)
class Prompt:
    """One prompt. ``text`` is what was tokenised, template included; ``token_ids`` is never empty."""

    id: str
    token_ids: tuple[int, ...]
    ground_truth: str
    data_source: str
    text: str


@dataclass(frozen=True)
class PromptOptions:
    """How to read prompts.

    ``format``: "auto" (by the first row), "verl-parquet", "jsonl" or "gsm8k", see ``formats.py``. ``prompt_key``,
    ``answer_key``, ``id_key``: dotted paths such as ``reward_model.ground_truth``, None for the format's own; the id
    key "content" derives ids from the prompts' text. ``template``, ``system_prompt``: see ``templates.py``; an empty
    system prompt removes the row's. ``max_prompt_tokens``: longer prompts are bad rows. ``on_bad_row``: "error", or
    "skip" to leave it out and count it. ``on_duplicate_id``: "error", or "first" to keep the first copy and count the
    others; rows that share an id but not the question and the answer are an error always. ``limit``: stop after so many
    prompts.

    Raises DataError for a value out of range.
    """

    format: str = "auto"
    prompt_key: str | None = None
    answer_key: str | None = None
    id_key: str | None = None
    template: str = "auto"
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    on_bad_row: str = "error"
    on_duplicate_id: str = "error"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", ("auto", *SCHEMAS)),
            ("template", TEMPLATES),
            ("on_bad_row", ("error", "skip")),
            ("on_duplicate_id", ("error", "first")),
        ):
            if getattr(self, name) not in allowed:
                raise DataError(f"data.{name} is {getattr(self, name)!r}: it must be one of {', '.join(allowed)}")
        for name in ("max_prompt_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"data.{name} is {value}: it must be at least 1, or null for no bound")
        if not is_unicode(self.system_prompt or ""):
            raise DataError(f"data.system_prompt is {self.system_prompt!a}: it must be valid Unicode")


@dataclass
class PromptSet:
    """Prompts in the order of the files; ``rows`` were looked at, and ``skipped`` of them left out, by reason;
    ``notes``: what was kept, and is worth a look."""

    prompts: list[Prompt] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    files: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def summary(self) -> str:
        """One sentence for the log, such as "40 prompts from 1,280 rows of 1 file; left out 1,240: 1,240 copies
        ..."."""
        text = f"{_count(len(self.prompts), 'prompt')} from {_count(self.rows, 'row')} of {_count(self.files, 'file')}"
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
            text += f"; left out {self.skipped.total():,}: {reasons}"
        return text + self.told() + "."

    def told(self) -> str:
        """The notes, each behind a semicolon; empty where there is none."""
        return "".join(f"; {note}: {count:,}" for note, count in self.notes.items())

    def fingerprint(self) -> str:
        """16 hex digits over the ids in order: equal exactly if positions in this set mean the same prompts."""
        digest = hashlib.sha256("\n".join(prompt.id for prompt in self.prompts).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def load_prompts(files: Sequence[str | Path], tokenizer, options: PromptOptions | None = None) -> PromptSet:
    """Reads, templates and tokenises the prompts of some files, with a Hugging Face tokenizer.

    Raises DataError, one sentence: a file that cannot be read, a column that is missing, a bad row or a duplicate id
    that the options do not allow, or no prompt left.
    """
    options = options or PromptOptions()
    files = [files] if isinstance(files, (str, Path)) else list(files)
    if not files:
        raise DataError("there are no data files: set data.files")
    template = choose_template(options.template, tokenizer)
    found = PromptSet(files=len(files))
    seen: dict[str, tuple[str, Question]] = {}
    for path in files:
        table = read_table(path, wanted_columns(options.prompt_key, options.answer_key, options.id_key))
        schema = find_schema(table, options.format, options.prompt_key, options.answer_key, options.id_key)
        if not table.rows:
            found.notes[f"rows of {table.path}"] = 0
        for place, row in table.rows:
            if options.limit is not None and len(found.prompts) >= options.limit:
                return found
            found.rows += 1
            try:
                question = understand(row, schema, table.path.stem, found.notes)
                if question.id in seen:
                    _check_copy(place, question, *seen[question.id], options.on_duplicate_id)
                    found.skipped["copies of an id already read"] += 1
                    continue
                prompt = _make_prompt(question, template, tokenizer, options)
            except BadRow as bad:
                if options.on_bad_row == "error":
                    raise DataError(f"{place} {bad}, or set data.on_bad_row=skip") from bad
                found.skipped[bad.reason] += 1
                continue
            seen[question.id] = (place, question)
            found.prompts.append(prompt)
    if not found.prompts:
        raise DataError(f"no prompt is left: {found.summary()}")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _check_copy(place: str, question: Question, first_place: str, first: Question, on_duplicate_id: str) -> None:
    if question != first:
        raise DataError(
            f"{place} has the same id {question.id!r} as {first_place} but another question or answer: give every "
            f"question an id of its own"
        )
    if on_duplicate_id == "error":
        raise DataError(
            f"{place} has the same id {question.id!r} as {first_place}: make the ids unique, or set "
            f"data.on_duplicate_id=first to keep the first copy"
        )


def _make_prompt(question: Question, template: str, tokenizer, options: PromptOptions) -> Prompt:
    text = render(question.messages, template, tokenizer, options.system_prompt)
    if not is_unicode(text):
        raise BadRow("broken text", "has a prompt that the chat template makes invalid Unicode: correct the template")
    token_ids = tuple(tokenise(text, template, tokenizer))
    if not token_ids:
        raise BadRow("empty prompt", "has a prompt without tokens: give it a question")
    if options.max_prompt_tokens is not None and len(token_ids) > options.max_prompt_tokens:
        raise BadRow(
            "longer than max_prompt_tokens",
            f"has a prompt of {len(token_ids)} tokens: raise data.max_prompt_tokens={options.max_prompt_tokens}",
        )
    return Prompt(question.id, token_ids, question.ground_truth, question.data_source, text)
