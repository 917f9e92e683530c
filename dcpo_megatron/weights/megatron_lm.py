"""Megatron-LM's own folder around a checkpoint, which ``--load DST`` of its training script reads:

DST/latest_checkpointed_iteration.txt      ``release`` (weights to start from), or the iteration to go on at
DST/release  or  DST/iter_0000100          the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.weights.conversion_jobs import ConversionJob, WorkUnit
from dcpo_megatron.weights.torch_dist import Record

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class InMegatronLmRoot:
    """``job`` with its checkpoint one folder deeper. ``iteration`` 0 makes a release, from which Megatron-LM takes the
    weights alone."""

    job: ConversionJob
    iteration: int = 0

    @property
    def _name(self) -> str:
        return f"iter_{self.iteration:07d}" if self.iteration else "release"

    def identity(self) -> dict:
        return self.job.identity() | {"inside": self._name}

    def units(self) -> list[WorkUnit]:
        return self.job.units()

    def run(self, number: int, folder: Path, progress: Callable[[int], None]) -> list[Record]:
        (folder / self._name).mkdir(exist_ok=True)
        return self.job.run(number, folder / self._name, progress)

    def finish(self, folder: Path, records: list[Record]) -> None:
        self.job.finish(folder / self._name, records)
        (folder / TRACKER).write_text(str(self.iteration or "release"), encoding="utf-8")
