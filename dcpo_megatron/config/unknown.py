"""What to say to a key that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unknown_key(key: str, known: Sequence[str]) -> str:
    """A sentence that names the nearest of the ``known`` keys."""
    # A key below one that has a plain value; one given without its section, or under the wrong one; else a misspelt
    # one.
    sections = {name.split(".")[0] for name in known if "." in name}
    nearest = [name for name in known if "." not in name and name not in sections and key.startswith(f"{name}.")]
    nearest = nearest or [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    nearest = nearest or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f": did you mean {nearest[0]!r}?" if nearest else ": see `dcpo train --keys`")
