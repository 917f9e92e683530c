"""Weights through files that trainer and servers both see, for servers that share no network group with the trainer.

    FOLDER/.incomplete-7/model-00001-of-....safetensors ...
        -- complete, on the disk -->  FOLDER/version-7  -- committed -->  the older ones are removed

A file or folder gets its name when all of it is on the disk; what a full disk or a killed trainer leaves is under a
name that nobody reads, and the servers go on with the weights that they have. Servers sample until all files are
written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dcpo_megatron.files import discard, remove, replace, sync
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.weights.hf_writing import shard_name, write_safetensors, write_weight_index
from dcpo_megatron.weights.publish.buckets import Bucket
from dcpo_megatron.weights.publish.transport import Transport


class DiskTransport(Transport):
    """One safetensors shard a bucket, in ``folder``, which must be the publisher's own. The last version stays: servers
    may be started from it."""

    staged = True

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        # By begin().
        self._work: Path
        self._target: Path
        self._shards: list[list[str]] = []
        self._bytes = 0

    def begin(self, version: int) -> None:
        """Makes room for a version; removes what an interrupted publication left. Raises RolloutError."""
        self._work = self.folder / f".incomplete-{version}"
        self._target = self.folder / f"version-{version}"
        self._shards, self._bytes = [], 0
        try:
            for left in self.folder.glob(".incomplete-*"):
                discard(left)
            self._work.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, bucket: Bucket) -> None:
        """Adds a shard. Raises RolloutError where the disk is full or not writable; nothing is left of the version
        then."""
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket.tensors]
        try:
            write_safetensors(
                self._work / f"part-{len(self._shards)}",
                entries,
                ((name, tensor.cpu()) for name, tensor in bucket.tensors),
            )
        except OSError as error:
            raise self._failed(error) from error
        self._shards.append(bucket.names)
        self._bytes += bucket.bytes

    def seal(self) -> None:
        """Gives the version its name. Raises RolloutError."""
        try:
            for number in range(len(self._shards)):
                (self._work / f"part-{number}").rename(self._work / shard_name(number, len(self._shards)))
            write_weight_index(self._work, self._shards, self._bytes)
            sync(self._work)
            # The same version once more, for a server that came back.
            old = replace(self._work, self._target)
            if old is not None:
                remove(old)
        except OSError as error:
            raise self._failed(error) from error

    def load(self, server: Server, seconds: float) -> None:
        """``server`` reads the sealed version. Raises RolloutError."""
        body = {"model_path": str(self._target), "flush_cache": False}
        try:
            server.post("/update_weights_from_disk", body, timeout=seconds)
        except ServerError as error:
            if error.status is None:
                raise
            raise RolloutError(
                f"{server.url} could not load {self._target}: does its host see that folder? ({error})"
            ) from error

    def committed(self) -> None:
        """Removes older versions, as far as they let go: half of one has a name that nobody reads."""
        for other in self.folder.glob("version-*"):
            if other != self._target:
                discard(other)

    def _failed(self, error: OSError) -> RolloutError:
        shutil.rmtree(self._work, ignore_errors=True)
        try:
            room = f"{shutil.disk_usage(self.folder).free / 1e9:.3f} GB are free there"
        except OSError:
            room = "the folder cannot be read"
        return RolloutError(
            f"weights could not be written to {self.folder} ({error.strerror or error}; {room}): the servers keep the"
            " weights that they have; free space or set publish.folder"
        )
