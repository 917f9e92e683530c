"""What a run keeps of single responses for ``dcpo report``: a bounded file that costs next to nothing.

    OUTPUT/samples.jsonl, one JSON object a line {"kind": "response", "step", "prompt_id", "correct", "reward",
    "advantage", "length", "minibatch", "tokens": [[text, old log-prob, ratio, lower, upper, clipped], ...]} {"kind":
    "visit", "step", "prompt_id", "rewards": [G], "advantages": [G], "visits", "mean", "std"}

Responses: every ``logging.samples`` steps the first ones of the LAST minibatch, whose policy is furthest from the old
one, with the ratios that its update is about to see: one forward pass of the first micro-batch. ``clipped`` is "",
"upper", "lower" or "cap". Visits: of a few prompts each one, with what SAS knows after it (null without SAS). What is
kept: the first sampled step and the newest, and so many visits of a prompt; the file stays under some megabytes however
long the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dcpo_megatron.advantages.sas import RewardHistory
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.files import read_rows
from dcpo_megatron.mcore.batch import TrainingSample
from dcpo_megatron.mcore.layout import RankPosition
from dcpo_megatron.objectives import Objective, policy_loss

SAMPLES = "samples.jsonl"
RESPONSES, TOKENS, STEPS = 8, 600, 12  # of a step; of a response; sampled steps kept
PROMPTS, VISITS = 6, 100


class SampleLog:
    """Writes the file on the one rank that has the numbers: last pipeline stage, first of every other group. Calls are
    for all ranks.

    ``every``: steps; 0: nothing is kept. ``resumed_at``: rows of later steps are dropped; None: a new run. A file that
    cannot be written is said once, and costs no step.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        position: RankPosition,
        prompt_ids: Sequence[str],
        announce: Callable[[str], None],
        resumed_at: int | None = None,
    ):
        self._file, self._every, self._position, self._announce = folder / SAMPLES, every, position, announce
        self._writes = position.owns_loss and position.data_rank == 0 and position.context_rank == 0
        self._watched = dict.fromkeys(prompt_ids[:PROMPTS], 0)
        self._lines: list[tuple[str, int, str]] = []  # (kind, step, line)
        if not (self._writes and every):
            return
        if resumed_at is not None:
            for row in read_rows(self._file):
                if row["step"] <= resumed_at:
                    self._keep(row)
                    if row["kind"] == "visit" and row["prompt_id"] in self._watched:
                        self._watched[row["prompt_id"]] += 1
        self._write()

    def due(self, step: int) -> bool:
        """Whether responses of this step are kept."""
        return bool(self._every) and (step == 1 or step % self._every == 0)

    def visits(self, step: int, table: ResponseTable, history: RewardHistory | None) -> None:
        """Keeps this step's visits of the watched prompts."""
        if not (self._writes and self._every):
            return
        watched = [n for n, prompt in enumerate(table.prompts) if self._watched.get(prompt.id, VISITS) < VISITS]
        found = {table.prompts[n].id: rows for n in watched if len(rows := np.flatnonzero(table.prompt == n))}
        for prompt_id, group in found.items():
            # A first visit may have been taken back with the update that was left out.
            known = history.statistics(prompt_id)._asdict() if history is not None and history.visits(prompt_id) else {}
            self._watched[prompt_id] += 1
            self._keep({
                "kind": "visit", "step": step, "prompt_id": prompt_id,
                "rewards": table.reward[group].tolist(),
                "advantages": [_short(advantage) for advantage in table.advantage[group].tolist()],
                "visits": known.get("visits", self._watched[prompt_id]), "mean": known.get("mean"),
                "std": known.get("std"),
            })  # fmt: skip
        if found:
            self._write()

    def responses(
        self,
        step: int,
        table: ResponseTable,
        minibatches: Sequence[Sequence[Sequence[TrainingSample]]],
        logprobs_of: Callable[[Sequence[Sequence[TrainingSample]]], dict[int, torch.Tensor]],
        objective: Objective,
        text_of: Callable[[int], str],
    ) -> None:
        """Keeps the first responses of the last minibatch; to be called right before its update. Collective over the
        model's ranks.

        ``logprobs_of``: :meth:`PolicyModel.logprobs`; ``text_of``: the text of a token.
        """
        # The interleaved schedule wants a multiple of the pipeline size.
        part = minibatches[-1][: self._position.pipeline_size]
        current = logprobs_of(part)
        chosen = [sequence for micro_batch in part for sequence in micro_batch][:RESPONSES]
        if not self._position.owns_loss or not chosen:
            return
        new = self._whole(torch.cat([current[sequence.number] for sequence in chosen]))
        old = self._whole(torch.cat([sequence.old_logprobs for sequence in chosen]).cpu())
        if not self._writes:
            return
        counts = [len(sequence.response_ids) for sequence in chosen]
        for sequence, now, before in zip(chosen, new.split(counts), old.split(counts), strict=True):
            row = sequence.number
            self._keep({
                "kind": "response", "step": step, "prompt_id": table.prompt_id(row),
                "correct": bool(table.correct[row]), "reward": float(table.reward[row]),
                "advantage": _short(float(table.advantage[row])), "length": len(now), "minibatch": len(minibatches),
                "tokens": _tokens(now, before, sequence, objective, text_of),
            })  # fmt: skip
        steps = sorted({step for kind, step, _ in self._lines if kind == "response"})
        kept = {*steps[:1], *steps[1:][-(STEPS - 1) :]}
        self._lines = [line for line in self._lines if line[0] != "response" or line[1] in kept]
        self._write()

    def _whole(self, values: torch.Tensor) -> torch.Tensor:
        """With context parallelism each rank holds its places and NaN elsewhere."""
        if self._position.context_size == 1:
            return values
        group = self._position.context_group
        values = torch.nan_to_num(values, nan=0.0)
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values, group=group)
        return values.cpu()

    def _keep(self, row: dict) -> None:
        self._lines.append((row["kind"], row["step"], json.dumps(row) + "\n"))

    def _write(self) -> None:
        part = self._file.with_suffix(".jsonl.part")
        try:
            part.write_text("".join(line for *_, line in self._lines), encoding="utf-8")
            part.rename(self._file)
        except OSError as error:
            self._announce(f"{self._file.name} cannot be written ({error.strerror}): training goes on without samples")
            self._writes = False


def _tokens(
    new: torch.Tensor,
    old: torch.Tensor,
    sequence: TrainingSample,
    objective: Objective,
    text_of: Callable[[int], str],
) -> list[list]:
    sequence_level = objective.ratio_level == "sequence"
    # As the update makes it: one that is beyond fp32 becomes infinite, and the update, not this page, refuses it.
    advantage = torch.tensor([sequence.advantage], dtype=new.dtype)
    terms = policy_loss(
        new,
        old,
        advantage.expand_as(new),
        objective,
        response_ids=torch.zeros(len(new), dtype=torch.long) if sequence_level else None,
        response_lengths=torch.tensor([len(new)]) if sequence_level else None,
    )
    names = [""] * len(new)
    for name in ("upper", "lower", "cap"):
        for place in getattr(terms, f"clipped_{name}").nonzero().flatten().tolist():
            names[place] = name
    columns = (
        old.tolist(),
        terms.ratio.tolist(),
        terms.lower.expand_as(new).tolist(),
        terms.upper.expand_as(new).tolist(),
    )
    rows = zip(np.asarray(sequence.response_ids).tolist(), *columns, names, strict=True)
    return [
        [text_of(token), *(_short(value) for value in values), clipped]
        for token, *values, clipped in list(rows)[:TOKENS]
    ]


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) and abs(value) < 1e6 else None
