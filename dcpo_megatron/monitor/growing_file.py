"""Files of metrics that only grow. Where the disk is full or the shared folder gone, what was to be written waits in
memory: metrics are no reason to lose a run."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class GrowingFile:
    """Appends records to a file, each whole or not at all, in their order.

    ``announce`` is told when the disk is full, and at the end what could not be written.
    """

    def __init__(self, path: Path, announce: Callable[[str], None]):
        self._path, self._name, self._announce = path, path.name, announce
        self._waiting: list[bytes] = []
        self._full = False
        self._file = path.open("ab", buffering=0)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def append(self, record: bytes) -> None:
        self._waiting.append(record)
        self._write()

    def _write(self) -> None:
        data, end = b"".join(self._waiting), None
        try:
            if self._full:  # a handle that has outlived its file system stays dead
                dead, self._file = self._file, self._path.open("r+b", buffering=0)
                with contextlib.suppress(OSError):
                    dead.close()
            end, written = self._file.seek(0, 2), 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            if not self._full:
                self._announce(f"{self._name} cannot be written ({error.strerror}): its rows wait in memory")
            # No half of a record stays; cutting a file shorter needs no room.
            if end is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
            self._full = True
            return
        self._waiting.clear()
        self._full = False

    def close(self) -> None:
        """Safe to call twice."""
        if self._file.closed:
            return
        if self._waiting:
            self._write()
        if self._waiting:
            self._announce(f"{len(self._waiting)} rows of {self._name} are lost: they could not be written to the end")
        self._file.close()


class BoardFile:
    """Scalars for TensorBoard: an event file in ``folder``. The package's own writer ends the run, from a thread, where
    the disk is full.

    ``purge_step``: what TensorBoard knows of this step and later ones, from earlier files, is forgotten. Raises
    OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, announce: Callable[[str], None], purge_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = GrowingFile(folder / name, announce)
        self._event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))

    def _event(self, event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        self._file.append(buffer.getvalue())

    def close(self) -> None:
        self._file.close()
