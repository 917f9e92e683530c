"""The model families that can be trained, one file each: a module of this package with a ``FAMILY``.

They are found by listing the package, so that a new file is a new family:

    families/qwen2.py   FAMILY = Family(model_type="qwen2", layer=DENSE_LAYER | QKV_BIAS, ...)   ->   FAMILIES["qwen2"]
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from dcpo_megatron.mcore.families.base import Family


def discover(package: str, folders: Iterable[str]) -> dict[str, Family]:
    """``{model_type: family}`` of every module of ``package`` in ``folders`` except ``base``, sorted by name.

    Raises:
        TypeError: a module without a ``FAMILY``.
        ValueError: two modules with one model_type.
    """
    found: dict[str, Family] = {}
    origin: dict[str, str] = {}
    for module in sorted(pkgutil.iter_modules(folders), key=lambda module: module.name):
        if module.name == "base":
            continue
        family = getattr(importlib.import_module(f"{package}.{module.name}"), "FAMILY", None)
        if not isinstance(family, Family):
            raise TypeError(
                f"{package}.{module.name} has no FAMILY: each module of {package} describes one model family"
            )
        if family.model_type in found:
            raise ValueError(
                f"{package}.{origin[family.model_type]} and {package}.{module.name} both describe model_type "
                f"{family.model_type!r}: keep one of them"
            )
        found[family.model_type] = family
        origin[family.model_type] = module.name
    return dict(sorted(found.items()))


FAMILIES: dict[str, Family] = discover(__name__, __path__)
