"""What all methods of one seed begin with: prompts to train on, held-out prompts, and a small model warmed up on other
problems of the same task.

    FOLDER/train.jsonl  held_out.jsonl  start/ (a Hugging Face folder)  made.json (what it was made from; written last)

The warm-up sees a mix of responses, with worked steps and without: the model can do both, is right more often with
them, and has to find that out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from dcpo_megatron.comparison.plan import PlanError, TaskSection
from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.chains import CHARACTERS, make_chains

MADE = "made.json"


def is_made(folder: Path, task: TaskSection) -> bool:
    """Whether ``folder`` is complete. Raises PlanError where it was made for another task."""
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if made["task"] != task.model_dump(mode="json"):
        raise PlanError(
            f"{folder} was made for another task than the plan's: give another output, or remove the folder"
        )
    return True


def make_start(
    folder: Path, task: TaskSection, seed: int, progress: Callable[[int, float, float], None] | None = None
) -> dict:
    """Makes the folder of ``seed``, or leaves it as it is where it is complete; returns what ``made.json`` holds.

    ``progress``: see :func:`~dcpo_megatron.toys.warm_up.warm_up`.

    Raises:
        PlanError: the folder was made for another task, or the task has too few problems.
        RuntimeError: the warm-up did not reach its target.
    """
    if is_made(folder, task):
        return json.loads((folder / MADE).read_text(encoding="utf-8"))
    import torch

    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save, warm_up

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = make_chains(task.train + task.supervised + task.checks, seed, task.chains())
        held_out = make_chains(task.held_out, seed, task.chains(), split="held_out")
    except ValueError as error:
        raise PlanError(f"task: {error}") from None
    train, supervised, checks = (
        rows[: task.train],
        rows[task.train : -task.checks],
        rows[-task.checks :],
    )
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held_out.jsonl")

    draw = random.Random(f"{seed}/worked")
    pairs = [
        (row["prompt"], row["worked"] if draw.random() < task.worked else f"\\boxed{{{row['answer']}}}")
        for row in supervised
    ]
    tokenizer = make_tokenizer(CHARACTERS)
    model = make_model(len(tokenizer), seed=seed, **task.model.model_dump())
    steps, accuracy = warm_up(
        model,
        tokenizer,
        pairs,
        [(row["prompt"], row["worked"]) for row in checks],
        target_accuracy=task.target,
        seed=seed,
        lr=task.lr,
        max_steps=task.max_steps,
        progress=progress,
    )
    save(model, tokenizer, folder / "start")
    made = {"task": task.model_dump(mode="json"), "seed": seed, "warm_up_steps": steps, "warm_up_accuracy": accuracy}
    (folder / MADE).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made
