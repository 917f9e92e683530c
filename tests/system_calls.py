"""The order of the system calls that make a file durable."""

import os
from pathlib import Path

import pytest


class Calls(list):
    """``("sync", path)`` and ``("rename", old path, new path)``, in their order, under the names that the files had
    then."""

    def at(self, *call) -> int:
        """Where ``call`` stands; fails where it was not made."""
        assert call in self, f"{call} is not among {self}"
        return self.index(call)

    def assert_durable(self, work: Path, target: Path, files: set[str]) -> None:
        """``work`` got the name ``target`` when ``files`` in it, its folders and itself were on the disk; then its
        parent was."""
        renamed = self.at("rename", work, target)
        for name in {*files, *(parent for file in files for parent in Path(file).parents)}:
            assert self._synced(work / name, renamed), f"{name} was not on the disk before {target.name} got its name"
        assert ("sync", target.parent) in self[renamed:], f"the name {target.name} was not on the disk"

    def _synced(self, path: Path, before: int) -> bool:
        """Whether a file, or a folder with all names in it, was synced; it may have had another name then."""
        for what, old, *new in reversed(self[:before]):
            if what == "sync" and old == path:
                return True
            if what == "rename" and new[0].parent == path:
                return False
            if what == "rename" and new[0] == path:
                path = old
        return False


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
