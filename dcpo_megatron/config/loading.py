"""From YAML files and ``key.sub=value`` words to a :class:`~dcpo_megatron.config.schema.Config`, and back.

Files are merged from left to right, then the overrides. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dcpo_megatron.config.recipes import find_recipe
from dcpo_megatron.config.schema import Config, ConfigError, Section
from dcpo_megatron.config.unknown import unknown_key
from dcpo_megatron.objectives import Objective


def known_keys() -> list[str]:
    """Every dotted key of the configuration."""
    keys = ["output", "objective.preset"]
    keys += [f"objective.{field.name}" for field in dataclasses.fields(Objective)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
    return keys


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Reads YAML files or recipes by name (later ones win key by key), then ``key.sub=value`` overrides (values are
    YAML).

    Raises:
        ConfigError: a file that is missing or not YAML, an override without ``=``, an unknown key, a value of the wrong
            type.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, _read_yaml(file))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {override!r} is not of the form key.sub=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        merged = _merge(merged, _nest(key.split("."), _as_number(value)))
    _refuse_unknown(merged)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        reasons = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "missing":
                reasons.append(f"{key} is missing: give it in a file or as {key}=...")
            else:
                reasons.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
        raise ConfigError("\n".join(reasons)) from None
    objective = config.make_objective()
    if objective.overlong_buffer >= config.rollout.max_response_tokens:
        raise ConfigError(
            f"objective.overlong_buffer={objective.overlong_buffer} must be below "
            f"rollout.max_response_tokens={config.rollout.max_response_tokens}: set one of them"
        )
    return config


def _read_yaml(name: str | Path) -> dict:
    try:
        path = find_recipe(name)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path} must hold sections (key: value), not a {type(content).__name__}")
    return _as_number(content)


def _as_number(value: Any) -> Any:
    # YAML 1.1 reads 1e-6 as a string (it wants 1.0e-6); a person means the number.
    if isinstance(value, dict):
        return {key: _as_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_number(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _nest(keys: list[str], value: Any) -> dict:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(base: dict, extra: dict) -> dict:
    result = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result


def _refuse_unknown(tree: dict) -> None:
    known = known_keys()
    sections = {key.split(".")[0] for key in known}
    problems = []
    for name, content in tree.items():
        if name not in sections:
            problems.append(unknown_key(str(name), [*sorted(sections), *known]))
        elif isinstance(content, dict):
            problems += [unknown_key(f"{name}.{key}", known) for key in content if f"{name}.{key}" not in known]
        elif name != "output":
            problems.append(
                f"{name} must hold keys of its own, such as {next(k for k in known if k.startswith(name + '.'))}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def to_yaml(config: Config) -> str:
    """The complete configuration, defaults included, as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
