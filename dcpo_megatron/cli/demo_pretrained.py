"""``dcpo demo --pretrained MODEL``: a real model instead of one made here. What differs from the demo's other half,
:mod:`dcpo_megatron.cli.demo`:

MODEL (GGUF file or Hugging Face folder) --> start/ --> megatron/ --> and back: every tensor bit for bit; logits of both
compared
word problems, or GSM8K of --data        --> train.jsonl, held_out.jsonl: conversations with a worked example
dcpo train                               --> from megatron/, with the model's own chat template
dcpo eval of start/ and model/           --> responses.html: the same problems before and after
metrics.jsonl                            --> is the reward of the last five steps above that of the first five?
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from statistics import fmean, variance

WINDOW = 5  # steps at each end of the run
ERRORS = 2.0  # standard errors by which the last ones must be above the first
SHOWN = 12  # problems on the page
TRAIN, HELD_OUT = 300, 40
GSM8K = {"train": "gsm8k_train.jsonl", "held_out": "gsm8k_test.jsonl"}
# Before each problem, as a turn of the conversation: told in words alone, a model of this size does not keep to the
# form.
EXAMPLE = (
    {"role": "system", "content": "Solve the problem."},
    {"role": "user", "content": "Tim has 3 pens and buys 4 more. How many pens does he have?"},
    {"role": "assistant", "content": "3 + 4 = 7. Answer: 7"},
)


class DemoError(ValueError):
    """The demo cannot be done as asked; one sentence."""


def check_data(data: str) -> None:
    """Raises DemoError where the folder ``data`` lacks one of GSM8K's files."""
    for name in GSM8K.values():
        if not (Path(data) / name).is_file():
            raise DemoError(f"--data {data} has no {name}: name a folder that holds {' and '.join(GSM8K.values())}")


def check_model(model: str) -> None:
    """Raises DemoError where ``model`` is neither a Hugging Face folder nor a GGUF file that can be read here."""
    from dcpo_megatron.weights.from_gguf import check_gguf
    from dcpo_megatron.weights.hf_folder import CheckpointError

    if (Path(model) / "config.json").is_file():
        return
    if Path(model).is_dir():
        raise DemoError(f"--pretrained {model} has no config.json: name a Hugging Face folder or a GGUF file")
    try:
        check_gguf(model)
    except CheckpointError as error:
        raise DemoError(f"--pretrained {error}") from None


def prepare(folder: Path, model: str, seed: int, data: str | None) -> None:
    """Writes ``start`` and ``megatron``, the model in both forms, after the way there and back has been compared;
    ``train.jsonl`` and ``held_out.jsonl``.

    Raises DemoError: a conversion was refused, or did not give the same model. DataError: of the files in ``data``.
    """
    from dcpo_megatron.cli import convert
    from dcpo_megatron.cli.demo import MARKER
    from dcpo_megatron.files import write_jsonl
    from dcpo_megatron.weights.from_gguf import gguf_to_hf
    from dcpo_megatron.weights.hf_folder import CheckpointError

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for split in GSM8K:
        rows = [row | {"prompt": [*EXAMPLE, *row["prompt"]]} for row in _problems(split, seed, data)]
        write_jsonl(rows, folder / f"{split}.jsonl")
    start, megatron, back = (folder / name for name in ("start", "megatron", "back"))
    if Path(model).is_dir():
        shutil.copytree(model, start)
    else:
        print(f"reading {model}", flush=True)
        try:
            gguf_to_hf(model, start)
        except CheckpointError as error:
            raise DemoError(str(error)) from None
    for command in (
        ["hf-to-megatron", start, megatron, "--quiet"],
        ["megatron-to-hf", megatron, back, "--quiet"],
        ["verify", megatron, "--against", start, "--tokens", 128],
    ):
        if convert.main([str(word) for word in command]) != 0:
            raise DemoError(f"dcpo convert {' '.join(map(str, command))} failed; its own message is above")
    tensors, numbers = compare_weights(start, back)
    shutil.rmtree(back, ignore_errors=True)
    print(f"to Megatron and back: {tensors} tensors, {numbers:,} numbers, the same bit for bit", flush=True)


def _problems(split: str, seed: int, data: str | None) -> list[dict]:
    """Rows of id, messages and answer: word problems made here, or GSM8K's."""
    from dcpo_megatron.data.formats import BadRow, find_schema, understand
    from dcpo_megatron.data.readers import read_table
    from dcpo_megatron.toys.word_problems import make_word_problems

    if data is None:
        rows = make_word_problems({"train": TRAIN, "held_out": HELD_OUT}[split], seed, split=split)
        return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    table = read_table(Path(data) / GSM8K[split], ())
    schema = find_schema(table, "gsm8k", None, None, None)
    found = []
    for place, row in table.rows:
        try:
            question = understand(row, schema, "gsm8k")
        except BadRow as bad:
            raise DemoError(f"{place} {bad}") from None
        found.append({"id": question.id, "prompt": question.messages, "answer": question.ground_truth})
    return found


def compare_weights(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors and numbers of the model two Hugging Face folders hold, all of them equal bit for bit. Raises
    DemoError: the first that differs.

    What belongs to no part of the model (a copy of a tied embedding, old rotary frequencies) is not looked at.
    """
    import torch

    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.weights.hf_folder import SafetensorsFolder
    from dcpo_megatron.weights.mapping import hf_names

    first, second = SafetensorsFolder(one), SafetensorsFolder(other)
    names = set(hf_names(read_shape(one)))
    if missing := names - (first.names() & second.names()):
        raise DemoError(f"{one} and {other} name different tensors: {sorted(missing)[:3]}")
    numbers = 0
    for name in sorted(names):
        mine, theirs = first.read(name), second.read(name)
        # As bytes: NaN is equal to itself then, and -0.0 is not 0.0.
        if mine.dtype != theirs.dtype or not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (mine, theirs))):
            raise DemoError(f"tensor {name} of {other} is not that of {one} bit for bit")
        numbers += mine.numel()
    return len(names), numbers


def tell(folder: Path, config) -> bool:
    """Writes ``responses.html`` and says whether the reward rose; returns that. Raises DemoError where an evaluation
    fails."""
    from dcpo_megatron.files import read_rows

    _write_page(folder, config)
    rewards = [row["reward"] for row in read_rows(folder / "metrics.jsonl") if "reward" in row]
    first, last, error = rise(rewards)
    rose = last - first > ERRORS * error
    print(
        f"responses before and after: {folder / 'responses.html'}\n"
        f"mean reward {first:+.3f} in the first {WINDOW} steps, {last:+.3f} in the last {WINDOW}: {last - first:+.3f}, "
        f"standard error {error:.3f} (of the difference of two means of {WINDOW} steps, from their spread): "
        + (f"above {ERRORS:g} of them" if rose else f"NOT above {ERRORS:g} of them")
    )
    return rose


def rise(rewards: list[float]) -> tuple[float, float, float]:
    """Means of the first and the last :data:`WINDOW` steps, and the standard error of their difference: sqrt(s1^2 / n +
    s2^2 / n), s^2 a window's sample variance.

    A trend within a window counts as spread, so the error is rather too large.
    """
    first, last = rewards[:WINDOW], rewards[-WINDOW:]
    return fmean(first), fmean(last), math.sqrt((variance(first) + variance(last)) / WINDOW)


def _write_page(folder: Path, config) -> None:
    from dcpo_megatron.cli import eval as evaluation
    from dcpo_megatron.comparison.study_page import Heading, Paragraph, Table, as_html

    said: dict[str, dict[tuple, dict]] = {}
    for when, model in (("before", "start"), ("after", "model")):
        output = folder / "responses" / when
        words = [
            str(folder / model), *config.evaluation.files, "--output", str(output), "--quiet",
            "--samples", "1", "--limit", str(SHOWN), "--temperature", str(config.rollout.temperature),
            "--max-response-tokens", str(config.rollout.max_response_tokens),
            "--max-prompt-tokens", str(config.data.max_prompt_tokens), "--template", config.data.template,
            "--reward", config.reward.function, "--seed", str(config.training.seed), "--device",
            config.training.platform,
        ]  # fmt: skip
        if config.data.system_prompt is not None:
            words += ["--system-prompt", config.data.system_prompt]
        with contextlib.redirect_stdout(io.StringIO()):  # its table of accuracies
            code = evaluation.main(words)
        if code != 0:
            raise DemoError(f"the responses of {folder / model} could not be had; the message is above")
        said[when] = {(row["id"], row["sample"]): row for row in _rows(output / "responses.jsonl")}
    pairs = [(row, said["after"][place]) for place, row in said["before"].items()]
    question = {f"held_out/{row['id']}": row["prompt"][-1]["content"] for row in _rows(folder / "held_out.jsonl")}
    rows = [
        [
            question[old["id"]],
            old["ground_truth"],
            "most likely" if old["sample"] < 0 else "sampled",
            _cell(old),
            _cell(new),
        ]
        for old, new in sorted(pairs, key=lambda pair: (pair[0]["id"], pair[0]["sample"]))
    ]
    before, after = (fmean(row["reward"] for row in side) for side in zip(*pairs, strict=True))
    turns = " / ".join(f"{turn['role']}: {turn['content']}" for turn in EXAMPLE)
    blocks = [
        Heading("Responses before and after", 1),
        Paragraph(
            f"Held-out problems, at most {config.rollout.max_response_tokens} tokens a response: the most likely one,"
            f" and one sampled at temperature {config.rollout.temperature:g} with the same random numbers. The reward"
            f" stands before each; its mean is {before:+.2f} before and {after:+.2f} after {config.training.steps}"
            " steps."
        ),
        Paragraph(f"Each problem follows this conversation. {turns}"),
        Table(["problem", "answer", "response", "before", "after"], rows),
    ]
    (folder / "responses.html").write_text(as_html(blocks, "Responses before and after"), encoding="utf-8")


def _cell(row: dict) -> str:
    return f"[{row['reward']:+g}] {row['response']}" + (" … (cut off)" if row["finish_reason"] == "length" else "")


def _rows(file: Path) -> list[dict]:
    # Not splitlines: a response may hold other separators of lines.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
