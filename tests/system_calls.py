"""The order of the system calls that make a file durable."""

import os
from pathlib import Path

import pytest


class Calls(list):
    """``("sync", path)`` and ``("rename", old path, new path)``, in their order, under the names that the files had then."""

    def at(self, *call) -> int:
        """Where ``call`` stands; fails where it was not made."""
        assert call in self, f"{call} is not among {self}"
        return self.index(call)

    def assert_durable(self, work: Path, target: Path, files: set[str]) -> None:
        """``work`` got the name ``target`` when ``files`` in it, its folders and itself were on the disk; then its parent was."""
        renamed = self.at("rename", work, target)
        folders = {parent for file in files for parent in Path(file).parents}
        for name in [*files, *folders]:
            # A file may have had another name when it was synced.
            at = max((n for n, call in enumerate(self[:renamed]) if call == ("sync", work / name)), default=None)
            moved = [n for n, call in enumerate(self[:renamed]) if call[0] == "rename" and call[2] == work / name]
            if at is None and moved:
                at = self.index(("sync", self[moved[-1]][1]), 0, moved[-1])
            assert at is not None, f"{name} was not synced before {target.name} got its name"
        assert ("sync", target.parent) in self[renamed:], f"the name {target.name} was not synced"


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """What is synced and renamed from here on."""
    found, fsync, rename = Calls(), os.fsync, os.rename

    def noted_fsync(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(handle)

    def noted_rename(old, new, **more):
        rename(old, new, **more)
        found.append(("rename", Path(old), Path(new)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_rename)
    return found
