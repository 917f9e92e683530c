"""Reading ``metrics.jsonl`` back: the run that resumes, and those who only look, read the same rows."""

from __future__ import annotations

import json
from pathlib import Path


def read_rows(file: Path) -> list[dict]:
    """The whole rows of a ``metrics.jsonl``, without one that a killed run left half-written or a living one is writing; none where there is no file."""
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
