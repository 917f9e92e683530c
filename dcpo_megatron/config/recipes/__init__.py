"""Recipes by name: ``demo`` is ``dcpo_megatron/config/recipes/demo.yaml``, ``presets/grpo`` or ``grpo`` is
``dcpo_megatron/config/recipes/presets/grpo.yaml``.

A YAML put into that folder has a name; nothing else lists it.
"""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def find_recipe(name: str | Path) -> Path:
    """The file that ``name`` means: a file that exists, else a recipe of this package, with or without its folder and
    its ``.yaml``.

    Raises:
        FileNotFoundError: neither; the message names the nearest recipe and lists all.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipes = {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in sorted(FOLDER.rglob("*.yaml"))}
    wanted = path.with_suffix("").as_posix() if path.suffix == ".yaml" else path.as_posix()
    found = [file for recipe, file in recipes.items() if wanted in (recipe, recipe.rpartition("/")[2])]
    if len(found) == 1:
        return found[0]
    if path.is_dir():
        raise FileNotFoundError(f"configuration file {path} is a folder")
    # A folder before the name is no part of a misspelling: presets/grpo is as near to grop as grpo is.
    last = {recipe.rpartition("/")[2]: recipe for recipe in recipes}
    nearest = difflib.get_close_matches(wanted.rpartition("/")[2], last, n=1, cutoff=0.5)
    raise FileNotFoundError(
        f"configuration file {path} does not exist, and no recipe has that name"
        + (f": did you mean {last[nearest[0]]!r}?" if nearest else ":")
        + f" The recipes: {', '.join(recipes)}"
    )
