"""The responses of an evaluation on disk: one JSON object a line, appended when a batch is judged, and the settings
they were made with.

    OUTPUT/settings.json      what must be the same when the evaluation goes on; written first
    OUTPUT/responses.jsonl    every response, to be read; its lines are what is done

A line that a kill cut short is taken off. One process at a time: the file is locked.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

SETTINGS, RESPONSES = "settings.json", "responses.jsonl"
GREEDY = -1  # the sample number of a problem's greedy response


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked; one sentence."""


class ResponseStore:
    """What an evaluation in ``folder`` has, and where it adds to.

    Raises EvaluationError: the folder holds an evaluation with other settings, something else, or one that is under
    way; or it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strange = sorted(file.name for file in folder.iterdir())
            if strange and SETTINGS not in strange and not (set(strange) <= {SETTINGS + ".part", RESPONSES}):
                raise EvaluationError(
                    f"--output {folder} holds something else ({strange[0]}): name a new folder, or one of dcpo eval's"
                )
            self._file = (folder / RESPONSES).open("ab+", buffering=0)
        except OSError as error:
            raise EvaluationError(f"--output {folder} cannot be used ({error.strerror}): name another folder") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise EvaluationError(
                f"another process is evaluating into {folder}: wait for it, or name another folder"
            ) from None
        self._hold(settings)
        self.rows = self._read()

    def _hold(self, settings: dict) -> None:
        file = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if not file.is_file():
            part = file.with_suffix(".json.part")
            part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            part.rename(file)
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            self._file.close()
            raise EvaluationError(f"{file} is not JSON: name another --output") from None
        other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if other:
            self._file.close()
            key = other[0]
            raise EvaluationError(
                f"{self.folder} holds responses made with another {', '.join(other)} ({key}: {_short(before.get(key))}"
                f" then, {_short(settings.get(key))} now): give the same settings, or another --output"
            )

    def _read(self) -> dict[tuple[str, str, int], dict]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file.fileno(), whole)
        rows = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["set"], row["id"], row["sample"]] = row
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise EvaluationError(
                    f"line {number} of {self.folder / RESPONSES} is not a response of dcpo eval: remove the line, or"
                    " name another --output"
                ) from None
        return rows

    def add(self, rows: Sequence[dict]) -> None:
        """Keeps these responses, all or none of them. Raises EvaluationError where the disk takes no more."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise EvaluationError(
                f"{self.folder / RESPONSES} cannot be written ({error.strerror}): make room; the same command goes on"
            ) from None
        for row in rows:
            self.rows[row["set"], row["id"], row["sample"]] = row

    def close(self) -> None:
        """Lets another process have the folder."""
        self._file.close()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
