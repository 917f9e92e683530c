"""The plan of a comparison: one YAML that names methods, seeds and budget, and turns into one recipe of ``dcpo train``
a run.

    seeds: [0, 1]
    methods:
      grpo:                                    # a preset of that name
      dapo: {objective.overlong_buffer: 4}     # a preset, and keys that differ for this method alone
      wide: {objective.preset: grpo, objective.eps_high: 0.3}
    task: ...                                  # prompts and the start model are made, one set a seed
    train: ...                                 # the recipe that all methods share

A method may change the objective and nothing else: everything else is what makes the comparison equal.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.recipes import find_recipe
from dcpo_megatron.config.schema import Config, ConfigError
from dcpo_megatron.toys.chains import ChainTask


class PlanError(ValueError):
    """The plan cannot run; the message has one line a reason."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSize(_Section):
    layers: int = Field(2, ge=1)
    hidden: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    positions: int = Field(128, ge=8)


class TaskSection(_Section):
    """Chains of arithmetic, see ``toys/chains.py``, and the small model that is warmed up on them."""

    terms: tuple[int, int] = (2, 4)
    digits: tuple[int, int] = (1, 2)
    operations: str = "+-"
    train: int = Field(256, ge=1, description="prompts that are trained on")
    held_out: int = Field(128, ge=1, description="prompts for evaluation")
    supervised: int = Field(1500, ge=1, description="problems of the warm-up; no other part has them")
    checks: int = Field(512, ge=1, description="problems that tell how far the warm-up is; no other part has them")
    worked: float = Field(0.7, ge=0, le=1, description="share of the warm-up's responses with worked steps")
    target: float = Field(
        0.3, ge=0, lt=1, description="the warm-up ends when sampling gives the worked response so often"
    )
    lr: float = Field(2e-3, gt=0)
    max_steps: int = Field(4000, ge=1)
    model: ModelSize = Field(default_factory=ModelSize)

    @model_validator(mode="after")
    def _is_a_task(self) -> TaskSection:
        self.chains()
        return self

    def chains(self) -> ChainTask:
        return ChainTask(self.terms, self.digits, self.operations)


class Plan(_Section):
    """The whole comparison. ``train`` holds sections of ``dcpo train``."""

    output: str = Field("runs/compare", description="folder of the comparison")
    seeds: list[int] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    task: TaskSection | None = Field(
        None, description="none: train.model.path and train.data.files are those of all runs"
    )
    train: dict[str, Any] = Field(default_factory=dict)
    ranks: int = Field(1, ge=1, description="ranks a run")
    parallel: int | None = Field(
        None, ge=1, description="runs side by side; none: as many as cores, or GPUs, are there for"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _nothing_is_no_change(cls, value: Any) -> Any:
        return (
            {str(name): {} if keys is None else keys for name, keys in value.items()}
            if isinstance(value, dict)
            else value
        )

    @model_validator(mode="after")
    def _can_be_compared(self) -> Plan:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds} must be distinct and not below 0")
        for name, keys in self.methods.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"method {name!r}: a name has letters, digits, - and _ only, it becomes a folder")
            foreign = [key for key in keys if not key.startswith("objective.")]
            if foreign:
                raise ValueError(
                    f"method {name} sets {foreign[0]!r}: only objective.* may differ between methods, all else belongs"
                    " in train"
                )
        taken = [
            key
            for key, section in (
                ("model.path", "model"),
                ("data.files", "data"),
                ("evaluation.files", "evaluation"),
                ("training.seed", "training"),
                ("output", None),
            )
            if _holds(self.train, key) and (self.task is not None or section in ("training", None))
        ]
        if taken:
            raise ValueError(f"train.{taken[0]} is the comparison's own to set: leave it out")
        if "objective" in self.train and "preset" in (self.train["objective"] or {}):
            raise ValueError("train.objective.preset is what methods differ in: leave it out")
        return self

    # -- what follows from it ----------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def start_folder(self, seed: int) -> Path:
        """Where the start model and the prompts of ``seed`` are."""
        return self.folder / "starts" / f"seed-{seed}"

    def run_folder(self, method: str, seed: int) -> Path:
        return self.folder / "runs" / method / f"seed-{seed}"

    def recipe(self, method: str, seed: int) -> Config:
        """The configuration of one run, checked. Raises ConfigError."""
        keys = {"objective.preset": method} | self.methods[method]
        keys |= {"training.seed": seed, "output": str(self.run_folder(method, seed))}
        if self.task is not None:
            start = self.start_folder(seed)
            keys |= {
                "model.path": str(start / "start"),
                "data.files": [str(start / "train.jsonl")],
                "evaluation.files": [str(start / "held_out.jsonl")],
            }
        return load_config([], [f"{key}={json.dumps(value)}" for key, value in (_flat(self.train) | keys).items()])

    def objectives(self) -> dict[str, dict[str, Any]]:
        """Every field of each method's objective, by method."""
        seed = self.seeds[0]
        return {method: dataclasses.asdict(self.recipe(method, seed).make_objective()) for method in self.methods}


def load_plan(file: str | Path, output: str | None = None) -> Plan:
    """Reads and checks a plan (a file, or ``compare``, the study's), every method's recipe included. Raises
    PlanError."""
    try:
        file = find_recipe(file)
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise PlanError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{file} must hold sections (methods, seeds, train), not a {type(content).__name__}")
    try:
        plan = Plan.model_validate(content | ({"output": output} if output else {}))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"{file}: {key + ': ' if key else ''}{text[0].lower()}{text[1:]}")
        raise PlanError("\n".join(lines)) from None
    for method in plan.methods:
        try:
            plan.recipe(method, plan.seeds[0])
        except ConfigError as error:
            raise PlanError("\n".join(f"{file}: method {method}: {line}" for line in str(error).splitlines())) from None
    return plan


def _holds(tree: dict, key: str) -> bool:
    first, _, rest = key.partition(".")
    if not isinstance(tree, dict) or first not in tree:
        return False
    return not rest or _holds(tree[first], rest)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
