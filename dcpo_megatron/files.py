"""What is written is on the disk before it gets its name, and what is old goes without taking the new with it.

    NEW.incomplete  -- its files, its folders, itself: on the disk -->  NEW  -- and its parent too
    OLD  -- under a name that nobody reads -->  OLD.removing  -- what the file system lets go -->  gone, or a sentence

A folder may refuse to go: a file in it is immutable, or open on another host of a network file system. Then what is
left keeps the name that nobody reads.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

REMOVING = ".removing"


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk. Raises OSError: a full disk may say so only
    now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """:func:`sync` of everything below ``folder``, and of itself last. Raises OSError."""
    for entry in sorted(folder.iterdir()):
        sync_tree(entry) if entry.is_dir() else sync(entry)
    sync(folder)


def move_aside(path: Path) -> Path:
    """Gives a file or folder a free name that nobody reads, and returns it. Raises OSError: it cannot be moved."""
    if path.name.endswith(REMOVING):
        return path
    number, aside = 1, path.with_name(path.name + REMOVING)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{number}{REMOVING}")
    path.rename(aside)
    return aside


def moved_aside(path: Path) -> list[Path]:
    """What :func:`move_aside` made of ``path``, and of names that begin with it and a dot, and is still there."""
    names = (REMOVING, f".*{REMOVING}")
    return [Path(found) for name in names for found in sorted(glob.glob(glob.escape(str(path)) + name))]


def replace(work: Path, target: Path) -> Path | None:
    """Gives the finished folder ``work`` the name ``target``, on the disk too. Returns what had that name, aside now,
    for :func:`remove`; None where nothing had.

    Raises:
        OSError: it has not got its name; what had it has it again.
    """
    old = move_aside(target) if target.exists() else None
    try:
        work.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    sync(target.parent)
    return old


def remove(path: Path) -> str | None:
    """Removes a file or folder, as far as that is possible; a sentence where something is left of it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(path)  # once more, for what hinders it
        else:
            path.unlink()
    except OSError as error:
        if os.path.lexists(path):
            where = f" ({os.path.basename(error.filename)})" if error.filename else ""
            return (
                f"{path} could not be removed: {error.strerror or error}{where}; nothing reads it, remove it when"
                " you can"
            )
    return None


def discard(path: Path) -> str | None:
    """:func:`move_aside` and :func:`remove`; a sentence where that did not work. What cannot be moved stays whole."""
    try:
        aside = move_aside(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} could not be moved away: {error.strerror or error}; it stays as it is"
    return remove(aside)


def write_jsonl(rows: Iterable[dict], path: str | Path) -> None:
    """Writes one JSON object a line, as data files of prompts have it."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(file: Path) -> list[dict]:
    """The whole rows of a ``metrics.jsonl``, without one that a killed run left half-written or a living one is
    writing; none where there is no file."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


@functools.cache
def digest_of_sources() -> str:
    """Of this package's own modules, 12 hexadecimal digits: two checkouts of one version differ there. A module that
    cannot be read is left out."""
    package, digest = Path(__file__).parent, hashlib.blake2b(digest_size=6)
    for file in sorted(package.rglob("*.py")):
        with contextlib.suppress(OSError):
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
