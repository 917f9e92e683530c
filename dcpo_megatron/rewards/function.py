"""Loading a reward function by its name: ``package.module:function``, ``package.module.function``,
``path/file.py:function``.

A reward function has the signature ``f(response: str, ground_truth: str) -> float`` and is called in a worker process
(see ``rewarder.py``), so it can import what it likes, and a hang or a crash in it costs one response.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

RewardFunction = Callable[[str, str], float]


class RewardError(ValueError):
    """A reward function that cannot be loaded, or a reward worker that cannot be started; one sentence."""


def load_reward_function(dotted_path: str) -> RewardFunction:
    """The function that ``dotted_path`` names.

    Raises RewardError if the module, file or attribute is missing, the module cannot be imported, or what is found
    cannot be called with two arguments.
    """
    place, colon, attribute = dotted_path.rpartition(":")
    if not colon:
        place, _, attribute = dotted_path.rpartition(".")
    if not place or not attribute:
        raise RewardError(
            f"reward function {dotted_path!r} names no module: write package.module:function or"
            " path/to/file.py:function"
        )
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    function = module
    for name in attribute.split("."):
        if not hasattr(function, name):
            public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise RewardError(f"{place} has no {attribute!r}; it defines {', '.join(public[:20]) or 'no functions'}")
        function = getattr(function, name)
    if not callable(function):
        raise RewardError(f"{attribute!r} in {place} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind("response", "ground_truth")
    except TypeError:
        raise RewardError(
            f"{attribute!r} in {place} cannot be called as f(response, ground_truth): its signature is "
            f"{inspect.signature(function)}"
        ) from None
    except ValueError:  # some built-in callables do not tell their signature
        pass
    return function


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise RewardError(
                f"there is no module {name!r} to load a reward function from (searched sys.path, without"
                f" {error.name!r})"
            ) from error
        raise RewardError(f"module {name!r} cannot be imported: {error}") from error
    except Exception as error:
        raise RewardError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise RewardError(f"there is no file {path!r} to load a reward function from")
    name = f"_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"file {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return module
