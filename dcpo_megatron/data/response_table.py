"""What every rank knows of every response of a rollout batch. Tokens stay where they were sampled until it is known who
trains on them (:mod:`dcpo_megatron.training.exchange`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dcpo_megatron.data.prompts import Prompt
from dcpo_megatron.data.response import Response

# Columns of the form on the wire, float64: whole numbers below 2^53 are exact, None is NaN.
_COLUMNS = ("prompt", "sample", "length", "stale", "reward", "advantage", "correct")


@dataclass(frozen=True, eq=False)
class ResponseTable:
    """One row a response, the same on every rank: prompt by prompt in sampling order. ``N`` rows, ``P`` prompts.

    ``prompts`` [P]: in sampling order. ``prompt`` [N]: index into them. ``sample`` [N]: 0..G-1 within the prompt.
    ``length`` [N]: response tokens. ``stale`` [N]: those of them that older weights sampled, which come first.
    ``reward``, ``advantage`` [N]: fp64. ``correct`` [N]: whether the raw reward means a right answer. ``holder`` [N]:
    the rank that sampled it; that rank has its rows' responses in the order of the table.
    """

    prompts: Sequence[Prompt]
    prompt: np.ndarray
    sample: np.ndarray
    length: np.ndarray
    stale: np.ndarray
    reward: np.ndarray
    advantage: np.ndarray
    correct: np.ndarray
    holder: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def total_length(self) -> np.ndarray:
        """[N]: tokens of prompt and response."""
        return np.array([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64)[self.prompt] + self.length

    def prompt_id(self, row: int) -> str:
        return self.prompts[self.prompt[row]].id


def rows_of(held: Sequence[Response], prompts: Sequence[Prompt], version: int) -> np.ndarray:
    """This rank's rows of the table as ``[n, columns]`` fp64.

    Args:
        held: in the order of ``prompts``, and within a prompt of samples.
        version: of the newest weights: tokens of older ones are stale.

    Raises:
        DataError: a response does not fit together (:meth:`Response.validate`).
    """
    place = {prompt.id: number for number, prompt in enumerate(prompts)}
    rows = np.empty((len(held), len(_COLUMNS)))
    for row, response in zip(rows, held, strict=True):
        response.validate()
        stale = np.searchsorted(response.weight_versions, version)
        known = (response.reward, response.advantage, response.correct)
        row[:4] = place[response.prompt_id], response.sample_index, len(response.token_ids), stale
        row[4:] = [math.nan if value is None else value for value in known]
    return rows


def table_of(prompts: Sequence[Prompt], rows: Sequence[np.ndarray]) -> ResponseTable:
    """The table from every rank's :func:`rows_of`, in rank order."""
    everyone = np.concatenate(rows).reshape(-1, len(_COLUMNS))
    holder = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    order = np.lexsort((everyone[:, 1], everyone[:, 0]))
    columns = dict(zip(_COLUMNS, everyone[order].T, strict=True))
    for name in ("prompt", "sample", "length", "stale"):
        columns[name] = columns[name].astype(np.int64)
    columns["correct"] = columns["correct"] == 1
    return ResponseTable(prompts, **columns, holder=holder[order])
