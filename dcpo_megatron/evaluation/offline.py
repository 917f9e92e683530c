"""Evaluating a model on files of problems with any rollout engine: sets of distinct problems, their responses, the
result.

    files -> sets (each problem once) -> batches of requests not answered yet -> engine -> reward -> responses.jsonl ->
    numbers

Files that hold 32 copies of a problem, as the official ones of AMC and AIME do, are read as the problems they are: one
greedy response and k samples for each distinct problem, whatever the copies. A copy is a row with an id already read,
or with the same prompt and ground truth.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dcpo_megatron.data import DataError, Prompt, PromptOptions, load_prompts
from dcpo_megatron.evaluation.estimates import Answers, average, estimate, lengths, measures
from dcpo_megatron.evaluation.store import GREEDY, EvaluationError, ResponseStore
from dcpo_megatron.rewards import Rewarder
from dcpo_megatron.rollout import GenerateRequest, RolloutEngine, SamplingParams
from dcpo_megatron.rollout.streams import stream_seed
from dcpo_megatron.weights.hf_folder import companions


@dataclass(frozen=True)
class ProblemSet:
    """The distinct problems of one file; ``rows`` were read, ``copies`` of them were copies, ``left_out`` could not be
    used; ``notes``: see PromptSet."""

    name: str
    prompts: list[Prompt]
    rows: int
    copies: int
    left_out: int
    notes: str = ""


@dataclass(frozen=True)
class EvaluationSampling:
    """How problems are answered. ``samples``: a problem, at ``temperature``, beside the greedy response where
    ``greedy``."""

    samples: int
    greedy: bool
    max_response_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    seed: int
    correct_at: float


class OutOfTime(Exception):
    """The deadline has passed; what is finished is kept."""


def load_sets(files: Sequence[str], tokenizer, options: PromptOptions) -> list[ProblemSet]:
    """One set a file, named like the file. Raises DataError; EvaluationError where two files have one name."""
    sets = []
    for file in files:
        found = load_prompts([file], tokenizer, options)
        copies = found.skipped.pop("copies of an id already read", 0)
        distinct: dict[tuple, Prompt] = {}
        for prompt in found.prompts:
            distinct.setdefault((prompt.token_ids, prompt.ground_truth), prompt)
        copies += len(found.prompts) - len(distinct)
        name = Path(file).stem
        if any(other.name == name for other in sets):
            raise EvaluationError(f"two files are named {name}: results go by file name, rename one of them")
        sets.append(ProblemSet(name, list(distinct.values()), found.rows, copies, found.skipped.total(), found.told()))
    return sets


def file_fingerprint(file: str) -> str:
    """16 hex digits of a file's content. Raises DataError where it cannot be read."""
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None


def model_fingerprint(folder: str | Path) -> str:
    """16 hex digits: names, sizes and both ends of the weight files, and the whole of the small files beside and below
    them (configuration, tokenizer)."""
    digest, folder = hashlib.sha256(), Path(folder)
    suffixes = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin")
    files = {file for file in folder.iterdir() if file.is_file()} | {folder / path for path in companions(folder)}
    for file in sorted(file for file in files if file.suffix in suffixes):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}/{size}/".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            if size > 1 << 20:
                handle.seek(max(1 << 20, size - (1 << 20)))
                digest.update(handle.read())
    return digest.hexdigest()[:16]


def jobs_of(sets: Sequence[ProblemSet], sampling: EvaluationSampling) -> list[tuple[str, Prompt, int]]:
    """(set, problem, sample number) of every response wanted: greedy ones first, then a problem's samples together."""
    jobs = [(s.name, prompt, GREEDY) for s in sets for prompt in s.prompts] if sampling.greedy else []
    return jobs + [(s.name, prompt, number) for s in sets for prompt in s.prompts for number in range(sampling.samples)]


def answer(
    engine: RolloutEngine,
    tokenizer,
    rewarder: Rewarder,
    sets: Sequence[ProblemSet],
    sampling: EvaluationSampling,
    store: ResponseStore,
    *,
    batch: int,
    deadline: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fills ``store`` with every response that it lacks, ``batch`` at a time.

    Every response has a random stream of its own, so an evaluation that was stopped and goes on gives what one without
    a stop gives (with engines that follow seeds).

    Args:
        deadline: on ``time.monotonic``'s clock; asked before each batch.
        progress: takes (responses finished, responses in all).

    Raises:
        OutOfTime: the deadline has passed.
        RolloutError, EvaluationError: of the engine and the store; finished batches are kept.
    """
    jobs = jobs_of(sets, sampling)
    todo = [job for job in jobs if (job[0], job[1].id, job[2]) not in store.rows]
    done = len(jobs) - len(todo)
    progress(done, len(jobs))
    # Greedy and sampled responses cannot share a batch.
    for greedy in (True, False):
        mine = [job for job in todo if (job[2] == GREEDY) == greedy]
        params = SamplingParams(
            sampling.max_response_tokens,
            0.0 if greedy else sampling.temperature,
            1.0 if greedy else sampling.top_p,
            stop_token_ids=sampling.stop_token_ids,
        )
        for start in range(0, len(mine), batch):
            if deadline is not None and time.monotonic() >= deadline:
                raise OutOfTime
            part = mine[start : start + batch]

            def report(finished: int, total: int, done: int = done) -> None:
                progress(done + finished, len(jobs))

            requests = [
                GenerateRequest(prompt.token_ids, stream_seed(sampling.seed, -1, 0, f"{name}/{prompt.id}", number))
                for name, prompt, number in part
            ]
            generations = engine.generate(requests, params, report)
            texts = [
                tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True) for generation in generations
            ]
            scored = rewarder.score_each(texts, [prompt.ground_truth for _, prompt, _ in part])
            store.add(
                [
                    {
                        "set": name,
                        "id": prompt.id,
                        "sample": number,
                        "correct": bool(score.reward >= sampling.correct_at),
                        "reward": score.reward,
                        "failure": score.failure,
                        "tokens": len(generation.token_ids),
                        "finish_reason": generation.finish_reason,
                        "ground_truth": prompt.ground_truth,
                        "prompt": prompt.text,
                        "response": text,
                    }
                    for (name, prompt, number), generation, text, score in zip(
                        part, generations, texts, scored, strict=True
                    )
                ]
            )
            done += len(part)
            progress(done, len(jobs))


def result(sets: Sequence[ProblemSet], sampling: EvaluationSampling, store: ResponseStore) -> dict:
    """The numbers, fit for JSON. Every response must be in ``store``."""
    found: dict = {"sets": {}, "average": {}}
    values: dict[str, dict[str, list[float]]] = {}
    for s in sets:
        rows = {
            (prompt.id, number): store.rows[s.name, prompt.id, number] for _, prompt, number in jobs_of([s], sampling)
        }
        problems = [
            Answers(
                rows[prompt.id, GREEDY]["correct"] if sampling.greedy else None,
                tuple(rows[prompt.id, number]["correct"] for number in range(sampling.samples)),
            )
            for prompt in s.prompts
        ]
        values[s.name] = measures(problems)
        found["sets"][s.name] = {
            "problems": len(s.prompts),
            "rows": s.rows,
            "copies": s.copies,
            "left_out": s.left_out,
            "measures": {name: asdict(estimate(v, s.name, sampling.seed)) for name, v in values[s.name].items()},
            "greedy_tokens": _lengths(row for (_, number), row in rows.items() if number == GREEDY),
            "sampled_tokens": _lengths(row for (_, number), row in rows.items() if number != GREEDY),
            "reward_failures": sum(row["failure"] is not None for row in rows.values()),
        }
    for name in next(iter(values.values())):
        parts = [of_set[name] for of_set in values.values()]
        found["average"][name] = asdict(average(parts, list(values), sampling.seed))
    return found


def _lengths(rows) -> dict[str, float]:
    rows = list(rows)
    return lengths([row["tokens"] for row in rows], [row["finish_reason"] == "length" for row in rows])
