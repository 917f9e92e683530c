"""Files in shared memory that a killed server leaves: SGLang names them at random, and none but a live server removes
its own.

    healthy         what its process group has mapped is noted, here and beside its log: server-30000.shared
    ended           all of the group is gone: what is noted is removed
    started again   also after a launcher that was killed: what the note names and nobody maps is removed

Other files are nobody's business here.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Of SGLang's load snapshots and shared tensors, and of Python's semaphores.
_PREFIXES = ("/dev/shm/sglang_loads_", "/dev/shm/sgl_shm_", "/dev/shm/sem.mp-")


def mapped_files(group: int | None = None) -> set[str]:
    """Such files that processes of ``group`` (None: all processes that this user may look at) have mapped."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours to look at
            if group is None or os.getpgid(int(pid)) == group:
                with open(f"/proc/{pid}/maps") as maps:
                    found |= {
                        name for line in maps if (name := line.split(maxsplit=5)[-1].strip()).startswith(_PREFIXES)
                    }
    return found


class SharedFiles:
    """Those of one server; ``note`` is the file that outlives its launcher."""

    def __init__(self, note: Path):
        self._note = note
        self._noted: set[str] = set()

    def see(self, group: int) -> None:
        """Notes what the server's process group has mapped now. A disk that does not take the note costs the note."""
        self._noted |= mapped_files(group)
        with contextlib.suppress(OSError):
            self._note.write_text("".join(f"{name}\n" for name in sorted(self._noted)), encoding="utf-8")

    def remove(self) -> None:
        """Removes what is noted. Call it when nothing is left of the server."""
        for name in self._noted:
            with contextlib.suppress(OSError):
                os.unlink(name)
        self._noted = set()
        with contextlib.suppress(OSError):
            self._note.unlink()

    def remove_left(self) -> None:
        """Removes what an earlier launcher's note names and no process has mapped."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            names = self._note.read_text(encoding="utf-8").splitlines()
            self._noted = {name for name in names if name.startswith(_PREFIXES)} - mapped_files()
            self.remove()
