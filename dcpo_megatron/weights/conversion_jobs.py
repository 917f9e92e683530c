"""Runs the units of a long conversion: shared by several processes, resumable, and visible under its final name only
when complete.

    DST.incomplete/            unit files; U.done.json beside each finished one; plan.json says of which job they are
    DST                        the folder, renamed once everything is there

A job is started again with the same command: units that are done are kept, unless the source or the options changed.
One process works on a folder at a time: it holds a lock on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol

import torch

from dcpo_megatron.files import sync, sync_tree
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.torch_dist import Record

PLAN = "plan.json"


@dataclass(frozen=True)
class WorkUnit:
    """A part of the work that one process does: what it is called and how many bytes it writes."""

    name: str
    bytes: int


class ConversionJob(Protocol):
    """What :func:`run_job` runs. Jobs are sent to worker processes, so they hold plain values only."""

    def identity(self) -> dict:
        """What the result depends on, as JSON: source files with size and time, options."""

    def units(self) -> list[WorkUnit]:
        """The parts, the same list in every process."""

    def run(self, number: int, folder: Path, progress: Callable[[int], None]) -> list[Record]:
        """Writes unit ``number`` into ``folder``; returns where its pieces lie."""

    def finish(self, folder: Path, records: list[Record]) -> None:
        """Completes ``folder`` from the records of all units."""


def run_job(
    job: ConversionJob,
    destination: str | os.PathLike,
    *,
    workers: int = 1,
    report: Callable[[int, int], None] | None = None,
):
    """Runs ``job`` into the new folder ``destination``.

    Args:
        workers: processes that share the work; 1 runs it here.
        report: told (bytes done, bytes in all) several times a second.

    Returns:
        The number of units that an earlier, interrupted run had finished.

    Raises:
        CheckpointError: ``destination`` holds something, another process works on it, the disk is too small, or a unit
            fails.
        KeyboardInterrupt: passed on; finished units are kept.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is not empty: give a new folder, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = destination.with_name(destination.name + ".incomplete")
    units = job.units()
    identity = json.loads(json.dumps(job.identity() | {"units": [unit.name for unit in units]}))
    if work.exists() and not (work / PLAN).is_file() and (not work.is_dir() or any(work.iterdir())):
        raise CheckpointError(f"{work} is in the way and no unfinished conversion: remove or rename it")
    work.mkdir(exist_ok=True)
    with _locked(work):
        resumed = _run_units(job, units, identity, work, workers, report or (lambda count, total: None))
        if destination.exists():
            destination.rmdir()
        work.rename(destination)
        sync(destination.parent)
    return resumed


def _run_units(job: ConversionJob, units: list[WorkUnit], identity: dict, work: Path, workers: int, report) -> int:
    """Everything of :func:`run_job` that happens inside the folder ``work``."""
    if _read_json(work / PLAN) != identity:
        # The plan goes last: without it nobody would know whose folder this is.
        for entry in sorted(work.iterdir(), key=lambda entry: entry.name == PLAN):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for half in work.rglob("*.part"):
        half.unlink()
    _write_json(work / PLAN, identity)

    done = {number for number in range(len(units)) if _read_json(work / f"{number}.done.json") is not None}
    resumed = len(done)
    todo = [number for number in range(len(units)) if number not in done]
    total = sum(unit.bytes for unit in units)
    needed = sum(units[number].bytes for number in todo)
    free = shutil.disk_usage(work).free
    if needed * 1.01 + 2**20 > free:
        raise CheckpointError(
            f"{work.parent} has {free / 1e9:.3f} GB free, {needed / 1e9:.3f} GB more are needed: free some space and"
            " run the same command again"
        )
    at = total - needed
    report(at, total)
    try:
        if workers <= 1:
            for number in todo:

                def progress(count: int) -> None:
                    nonlocal at
                    at += count
                    report(at, total)

                _run_unit(job, number, work, progress)
                done.add(number)
        else:
            _in_processes(job, todo, work, workers, at, total, report, done)
        # All from the notes: records of this run and of an earlier one make the same index, byte for byte.
        notes = [_read_json(work / f"{number}.done.json") for number in range(len(units))]
        job.finish(work, [_record(fields) for note in notes for fields in note])
        sync_tree(work)
    except OSError as error:
        raise CheckpointError(
            f"{work}: {error.strerror or error} after {len(done)} of {len(units)} parts: mend that and run the same"
            " command again, the finished parts are kept"
        ) from None
    for number in range(len(units)):
        (work / f"{number}.done.json").unlink()
    (work / PLAN).unlink()
    sync(work)
    return resumed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems know no locks; they are worked on without.
        if error.errno == errno.EWOULDBLOCK:
            os.close(handle)
            raise CheckpointError(
                f"another process works on {folder}: wait for it, or give another destination"
            ) from None
    try:
        yield
    finally:
        os.close(handle)


def _run_unit(job: ConversionJob, number: int, folder: Path, progress: Callable[[int], None]) -> None:
    records = job.run(number, folder, progress)
    _write_json(folder / f"{number}.done.json", [asdict(record) for record in records])


# -- worker processes ------------------------------------------------------------------------------

# By _start_worker().
_counter: Synchronized[int]
_stop: Event


class _Stopped(Exception):
    """Another unit failed or the user interrupted: this one ends at its next piece."""


def _start_worker(counter: Synchronized[int], stop: Event) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(job: ConversionJob, number: int, folder: Path) -> None:
    def progress(count: int) -> None:
        if _stop.is_set():
            raise _Stopped
        with _counter.get_lock():
            _counter.value += count

    progress(0)
    _run_unit(job, number, folder, progress)


def _in_processes(
    job: ConversionJob, todo: list[int], folder: Path, workers: int, at: int, total: int, report, done: set[int]
) -> None:
    """Runs the units ``todo``; adds to ``done`` those that finish."""
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(min(workers, max(len(todo), 1)), context, _start_worker, (counter, stop)) as pool:
        # Ctrl-C reaches every process of the terminal; workers inherit that it waits, and the parent tells them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waiting = {pool.submit(_work, job, number, folder): number for number in todo}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            while waiting:
                for future in [future for future in waiting if future.done()]:
                    future.result()
                    done.add(waiting.pop(future))
                report(at + counter.value, total)
                if waiting:
                    time.sleep(0.1)
        except BrokenProcessPool:
            raise CheckpointError(
                f"{folder}: a worker process died (out of memory, or killed): run the same command again, the finished"
                " parts are kept"
            ) from None
        finally:
            if waiting:
                stop.set()
            for future in waiting:
                future.cancel()


# -- notes on disk ---------------------------------------------------------------------------------


def _record(fields: dict) -> Record:
    as_tuple = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Record(**fields | as_tuple)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or written by half: that unit is done again


def _write_json(path: Path, value) -> None:
    work = path.with_name(path.name + ".part")
    work.write_text(json.dumps(value), encoding="utf-8")
    work.rename(path)


def file_facts(paths) -> list[list]:
    """Name, size and time of files: enough to see that a source changed."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]
