"""The checkpoints of a run on disk: which there are, which are whole, and which may go.

    OUTPUT/checkpoints/
        step-000040/                 complete: it got this name when everything in it was on the disk
            .metadata __R_0.distcp common.pt metadata.json     weights and optimizer, a Megatron torch_dist checkpoint
            huggingface/                                       configuration and tokenizer of the model
            run.json history.safetensors random-R.json         everything else
            manifest.json                                      size and SHA-256 of every file above
        step-000060.incomplete/      being written, or left by a run that was killed
        step-000020.damaged/         set aside because its files are not what its manifest says
        step-000010.removing/        what is left of an old one that could not be removed
        latest                       the name of the newest complete one

Pure file work: no process group, no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.files import REMOVING, discard, remove, replace, sync

MANIFEST = "manifest.json"
LATEST = "latest"
INCOMPLETE = ".incomplete"
DAMAGED = ".damaged"
# Bytes read at once: long calls, beside which the other threads of the process run undisturbed.
_READ_TOGETHER = 16 * 1024**2
_NAME = re.compile(r"^step-(\d+)$")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:06d}"


def checksum(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hexadecimal, as ``sha256sum`` prints it; processors have instructions for it. ``progress``
    is told bytes now and then."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_TOGETHER))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            progress(size)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and checksum of one file."""

    size: int
    checksum: str


def facts_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> FileFacts:
    return FileFacts(path.stat().st_size, checksum(path, progress))


def write_manifest(folder: Path, known: dict[str, FileFacts]) -> None:
    """Writes the manifest of every file in ``folder``; ``known`` gives those that their writers have summed up
    already."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {}
    for name in files:
        facts = known.get(name) or facts_of(folder / name)
        entries[name] = [facts.size, facts.checksum]
    write_text(folder / MANIFEST, json.dumps({"version": 1, "files": entries}, indent=1))


def read_manifest(folder: Path) -> dict[str, FileFacts] | None:
    """The manifest's entries; None where there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {name: FileFacts(int(size), str(digest)) for name, (size, digest) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def problem_of(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a complete-looking checkpoint, in words; None where all is well.

    ``names``: the files whose contents are summed up again (ranks share that work); sizes are looked at for all.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or cannot be read"
    for name, facts in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.size:
            return f"{name} has {file.stat().st_size} bytes instead of {facts.size}"
    for name in manifest if names is None else names:
        if checksum(folder / name) != manifest[name].checksum:
            return f"the contents of {name} have changed"
    return None


def complete_steps(root: Path) -> list[int]:
    """Steps of the checkpoints under their final names, oldest first."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for p in root.iterdir() if p.is_dir() and (m := _NAME.match(p.name)))


def remove_leftovers(root: Path) -> list[str]:
    """Removes what a killed run left half-written or half-removed; sentences about what cannot be removed."""
    if not root.is_dir():
        return []
    left = sorted(path for path in root.iterdir() if path.name.endswith((INCOMPLETE, ".part", REMOVING)))
    return [problem for path in left if (problem := discard(path))]


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not taken for a good one again; returns where it is now. Raises
    OSError."""
    number, target = 1, folder.with_name(folder.name + DAMAGED)
    if target.exists():
        discard(target)
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{number}{DAMAGED}")
    folder.rename(target)
    return target


def publish(work: Path, root: Path, step: int, warn: Callable[[str], None] = lambda text: None) -> Path:
    """Gives a finished folder its final name, and then ``latest`` its name.

    ``warn`` is told what does not matter to the new checkpoint: an old one of the same step that cannot be removed,
    ``latest`` that cannot be written.

    Raises:
        OSError: it has not got its name.
    """
    target = root / checkpoint_name(step)
    sync(work)
    # An older one of the same step, from before a resume further back.
    old = replace(work, target)
    try:
        write_text(root / LATEST, target.name + "\n")
    except OSError as error:
        warn(f"{root / LATEST} could not be written: {error.strerror or error}; {target.name} is complete all the same")
    if old is not None and (problem := remove(old)):
        warn(problem)
    return target


def prune(
    root: Path,
    keep_last: int,
    keep_every: int,
    upto: int | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Removes complete checkpoints but the newest ``keep_last`` and every multiple of ``keep_every`` (0: none); returns
    the steps removed.

    Args:
        upto: later ones than of this step (which could not be set aside) neither count nor go; None: all count.
        warn: is told what cannot be removed.
    """
    steps = [step for step in complete_steps(root) if upto is None or step <= upto]
    gone = []
    for step in steps[: -max(keep_last, 1)]:
        if keep_every and step % keep_every == 0:
            continue
        folder = root / checkpoint_name(step)
        if problem := discard(folder):
            warn(problem)
        if not folder.exists():
            gone.append(step)
    return gone


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that it is whole or not there."""
    work = path.with_name(path.name + ".part")
    with open(work, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    work.rename(path)
