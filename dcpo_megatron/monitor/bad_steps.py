"""Steps that teach nothing: an update whose gradient is not finite is left out, and where that goes on the run stops,
with the batch kept for study.

One such update happens; weights and optimizer are untouched by it. Step after step it is a fault, and every further
hour is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dcpo_megatron.data import Response, decode_responses, encode_responses
from dcpo_megatron.distributed import gather_on_first
from dcpo_megatron.mcore.step import UpdateResult


class BadStepsError(RuntimeError):
    """Too many bad steps in a row; the message says where the last batch is and what to look at."""


class BadSteps:
    """Counts bad steps in a row: those with an update that was left out, or whose loss is not finite.

    Args:
        folder: the run's; the batch goes there.
        limit: ``training.max_bad_steps``; 0 counts and never stops.
        is_writer: whether this rank writes the file.
    """

    def __init__(self, folder: Path, limit: int, is_writer: bool):
        self._folder, self._limit, self._is_writer = folder, limit, is_writer
        self.in_a_row = 0

    def note(self, step: int, held: Sequence[Response], total: int, updates: Sequence[UpdateResult]) -> None:
        """Takes in one step. A step without updates changes nothing. Collective over all ranks where it raises.

        Args:
            held: this rank's responses.
            total: of all ranks.
            updates: the same on every rank.

        Raises:
            BadStepsError: the limit is reached; on every rank.
        """
        if not updates:
            return
        bad = [number for number, update in enumerate(updates) if not _is_good(update)]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not self._limit or self.in_a_row < self._limit:
            return
        file = self._folder / f"bad-batch-step-{step}.responses"
        parts = gather_on_first(encode_responses(held))
        where = f"the step's {total} responses are in {file} (dcpo_megatron.data.decode_responses reads it)"
        if self._is_writer:
            try:
                everyone = [response for part in parts for response in decode_responses(part)]
                everyone.sort(key=lambda response: (response.prompt_id, response.sample_index))
                file.write_bytes(encode_responses(everyone))
            except OSError as error:
                where = f"the step's responses could not be written to {file} ({error.strerror})"
        raise BadStepsError(
            f"step {step}: {len(bad)} of {len(updates)} updates (first: update {bad[0] + 1}) had a gradient or loss"
            f" that is not finite, and so it was in {self.in_a_row} steps in a row"
            f" (training.max_bad_steps={self._limit}): the run is stopped. {where}: look at its rewards and advantages,"
            " then at gradient_norm, ratio and mismatch_abs_max of the steps before in metrics.jsonl, optimizer.lr and"
            " model.dtype"
        )


def _is_good(update: UpdateResult) -> bool:
    return update.stepped and math.isfinite(update.sums["loss"])
