"""Saves the whole run while training goes on.

    start    every rank copies its part to the host (training waits for this),
             a thread of each rank writes it                                     step-N.incomplete/
    poll     at each step boundary the ranks ask one another (one all-reduce)
             whether all have written                                            -> index, manifest, final name, latest
    finish   the same, but waits

Beside training the thread takes a tenth of a core at most, and gives way to everything else: a save costs many steps a
little and none of them much. Once it is waited for it does not rest.

A save that fails (a full disk) is reported and its remains are removed; training goes on, and the next save tries anew.
What does not matter to the new checkpoint (an old one that cannot be removed) is reported beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.checkpoint.snapshot import HostMemory, Snapshot
from dcpo_megatron.distributed import all_gather_on_host, all_reduce_on_host, host_group
from dcpo_megatron.files import discard
from dcpo_megatron.weights.conversion import write_index_with_companions
from dcpo_megatron.weights.torch_dist import Record
from dcpo_megatron.weights.torch_dist_writing import Rendered, render, write_rendered

_IDLE, _WRITING, _DONE, _FAILED = range(4)
# Seconds that the writer rests beside training for each second of processor time; it works for some milliseconds at a
# time.
_REST, _WORK = 9.0, 0.005


class StuckSaveError(TimeoutError):
    """A checkpoint was not written in time; the message says which and where."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: ``problem`` is None where the checkpoint is complete, else a sentence. ``seconds`` from its
    start. ``warnings``: on rank 0."""

    step: int
    problem: str | None
    seconds: float
    warnings: tuple[str, ...] = ()


class CheckpointSaver:
    """Writes checkpoints under ``root`` (a folder that every rank sees). All methods are collective.

    Args:
        hf_folder: configuration and tokenizer files that go into each checkpoint.
        keep_last, keep_every: which complete checkpoints stay (see :func:`~dcpo_megatron.checkpoint.folder.prune`).
        timeout: seconds that :meth:`finish` waits for the disk.
        device: of the tensors that snapshots copy.

    ``memory``: what snapshots should be copied into; free whenever no save is under way.
    """

    def __init__(
        self, root: Path, hf_folder: Path, *, keep_last: int, keep_every: int, timeout: float, device: torch.device
    ):
        self.root, self.hf_folder = root, hf_folder
        self.keep_last, self.keep_every = keep_last, keep_every
        self.timeout = timeout
        self.memory = HostMemory(device)
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._awaited = threading.Event()
        self._problem: str | None = None
        self._warnings: list[str] = []
        self._common: dict = {}

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._step is not None

    def start(
        self, step: int, snapshot: Snapshot, extras: Callable[[Path], None], *, beside_training: bool = True
    ) -> None:
        """Begins to write the state after ``step`` steps.

        Args:
            extras: writes this rank's other files into the folder it is given; runs in the background, on copies of its
                own.
            beside_training: the writer gives way to the ranks and rests; False where nothing else goes on until it is
                done.

        Raises:
            RuntimeError: a save is under way (call :meth:`finish` first).
        """
        if self.busy:
            raise RuntimeError(f"the save of step {self._step} is still under way")
        self._step, self._problem, self._started = step, None, time.monotonic()
        self._awaited = threading.Event()
        if not beside_training:
            self._awaited.set()
        self._common = snapshot.common
        work = self._work
        try:
            # An older attempt at the same step may have left files.
            if dist.get_rank() == 0:
                self._discard(work)
                # Not its parents: where the shared folder is gone, none of it must be made on this host's own disk.
                self.root.mkdir(exist_ok=True)
                work.mkdir()
        except OSError as error:
            self._problem = f"{work}: {error.strerror or error}"
        dist.barrier(group=host_group())
        # Rendered here, so that the thread has little to do that keeps Python's lock: training would wait for a thread
        # that has to wait for a core.
        pieces = [render(piece.key, piece.offsets, piece.data) for piece in snapshot.tensors]
        pieces += [render(key, None, data) for key, data in snapshot.objects]
        tensors = {p.key: [list(p.shape), str(p.data.dtype).removeprefix("torch.")] for p in snapshot.tensors}
        self._thread = threading.Thread(
            target=self._write, args=(work, pieces, tensors, extras, self._awaited), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def _work(self) -> Path:
        return self.root / (folders.checkpoint_name(self._step) + folders.INCOMPLETE)

    def _write(
        self,
        work: Path,
        pieces: list[Rendered],
        tensors: dict[str, list],
        extras: Callable[[Path], None],
        awaited: threading.Event,
    ) -> None:
        rank, rest = dist.get_rank(), _rests(awaited)
        if not awaited.is_set():
            _give_way()
        try:
            file = work / f"__{rank}_0.distcp"
            records = write_rendered(file, pieces, rest)
            extras(work)
            note = {
                "records": [asdict(record) for record in records],
                "tensors": tensors,
                "file": asdict(folders.facts_of(file, rest)),
            }
            folders.write_text(work / f"rank-{rank:05d}.json", json.dumps(note))
        except Exception as error:  # whatever it is, it must not be lost in a thread
            self._problem = f"rank {rank}: {getattr(error, 'strerror', None) or error} ({work})"

    def poll(self, stop_requested: bool = False) -> tuple[list[SaveResult], bool]:
        """At a step boundary: completes a save that every rank has written. Returns reports, and whether ANY rank was
        asked to stop."""
        status = _IDLE
        if self.busy:
            status = _WRITING if self._thread.is_alive() else _FAILED if self._problem else _DONE
        # Largest of: still writing (2), failed (1); a save is over where no rank is writing.
        flags = torch.tensor([status == _WRITING, status == _FAILED, stop_requested], dtype=torch.int32)
        writing, failed, stop = map(bool, all_reduce_on_host(flags, dist.ReduceOp.MAX).tolist())
        if not self.busy or writing:
            return [], stop
        return [self._complete(failed)], stop

    def finish(self) -> list[SaveResult]:
        """Waits for the save under way and completes it."""
        reports: list[SaveResult] = []
        self._awaited.set()
        while self.busy:
            self._thread.join(self.timeout)
            if self._thread.is_alive():
                raise StuckSaveError(
                    f"the checkpoint of step {self._step} was not written within {self.timeout:.0f} s: is the disk of"
                    f" {self.root} reachable?"
                )
            reports += self.poll()[0]
        return reports

    def _complete(self, failed: bool) -> SaveResult:
        step, work = self._step, self._work
        problem = None
        if failed:
            messages = all_gather_on_host((self._problem or "").encode())
            problem = next(message.decode() for message in messages if message)
        if dist.get_rank() == 0:
            try:
                if not failed:
                    self._index(work)
                    folders.publish(work, self.root, step, self._warnings.append)
                    folders.prune(self.root, self.keep_last, self.keep_every, step, self._warnings.append)
                else:
                    self._discard(work)
            except OSError as error:
                problem = f"{error.strerror or error} ({work})"
                self._discard(work)
        problem_bytes, *_ = all_gather_on_host((problem or "").encode())
        warnings, self._warnings = tuple(self._warnings), []
        self._step, self._thread, self._common = None, None, {}
        return SaveResult(step, problem_bytes.decode() or None, time.monotonic() - self._started, warnings)

    def _discard(self, work: Path) -> None:
        if warning := discard(work):
            self._warnings.append(warning)

    def _index(self, work: Path) -> None:
        records, tensors, known = [], {}, {}
        for rank in range(dist.get_world_size()):
            note_file = work / f"rank-{rank:05d}.json"
            note = json.loads(note_file.read_text(encoding="utf-8"))
            for fields in note["records"]:
                records.append(Record(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))
            tensors |= {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in note["tensors"].items()}
            known[f"__{rank}_0.distcp"] = folders.FileFacts(**note["file"])
            note_file.unlink()
        write_index_with_companions(work, tensors, records, self._common, self.hf_folder)
        folders.write_manifest(work, known)


def _rests(awaited: threading.Event) -> Callable[[int], None]:
    """What the writer calls now and then: sleeps in proportion to its work since it slept last, until ``awaited`` is
    set."""
    rested = time.thread_time()

    def rest(_: int) -> None:
        nonlocal rested
        worked = time.thread_time() - rested
        if worked >= _WORK:
            awaited.wait(_REST * worked)
            rested = time.thread_time()

    return rest


def _give_way() -> None:
    """This thread gets what processor time the others leave. Without it ranks that fill the cores would share them with
    their writers."""
    with contextlib.suppress(OSError, AttributeError):  # a system without it
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
