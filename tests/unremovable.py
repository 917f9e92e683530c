"""Files that cannot be removed, as on a network file system where another host holds them open."""

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

# linux/fs.h
_GET, _SET, _IMMUTABLE = 0x80086601, 0x40086602, 0x10


def _set(handle: int, immutable: bool) -> None:
    (flags,) = struct.unpack("l", fcntl.ioctl(handle, _GET, bytes(8)))
    flags = flags | _IMMUTABLE if immutable else flags & ~_IMMUTABLE
    fcntl.ioctl(handle, _SET, struct.pack("l", flags))


@contextlib.contextmanager
def unremovable(*paths: Path) -> Iterator[None]:
    """Files, or folders, that cannot be changed, moved or removed meanwhile, wherever what is above them is moved to.
    Skips the test where that cannot be had."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                _set(handle, True)
            except OSError as error:
                pytest.skip(f"no file can be made immutable here: {error.strerror}")
            stack.callback(_set, handle, False)
        yield
