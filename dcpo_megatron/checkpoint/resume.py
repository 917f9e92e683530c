"""What a checkpoint holds beside weights and optimizer, and how a run finds the checkpoint that it goes on from.

The same command starts a run and resumes it. A folder with a checkpoint is resumed from the newest one whose files are
what its manifest says; damaged ones are set aside aloud. A configuration that would make it another run is refused,
with the names of the keys.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.config.schema import Config, ConfigError
from dcpo_megatron.data import PromptSet
from dcpo_megatron.distributed import all_gather_on_host

RUN_FILE = "run.json"
HISTORY_FILE = "history.safetensors"
_VERSION = 1

# Keys that a resumed run may have otherwise: where things go, how long and how the work is laid out. The layout changes
# results by rounding only.
_FREE = (
    "output", "logging.", "evaluation.", "checkpoint.", "training.steps", "training.timeout_seconds",
    "training.save_every", "training.platform", "training.max_bad_steps", "reward.timeout_seconds", "reward.workers",
    "data.files", "servers.", "publish.", "rollout.max_mismatch", "training.start_timeout_seconds",
)  # fmt: skip
_LAYOUT = (
    "parallel.", "training.micro_batch_tokens", "training.packing", "model.head", "model.fused_head_loss",
    "model.recompute", "model.transformer_engine", "model.bias_activation_fusion",
    "model.gradient_accumulation_fusion", "model.grouped_experts", "model.moe_permute_fusion", "rollout.batch_size",
)  # fmt: skip


@dataclass
class RunState:
    """Everything of a run that is no tensor, after ``step`` steps; stored as JSON.

    ``sampler``: the position in the data. ``data``: fingerprint of the prompts. ``layout``: sizes and number of ranks
    that wrote it.
    """

    step: int
    updates_done: int
    sampler: dict
    evaluations: dict[str, dict[str, float]]
    train_seconds: float
    config: dict
    data: str
    layout: dict
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """Raises ValueError for anything that :meth:`to_json` did not write."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
            raise ValueError("it was written by another version of this program")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(str(error)) from None


def versions() -> dict[str, str]:
    """The packages that a run's numbers depend on."""
    names = ("dcpo-megatron", "megatron-core", "torch", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "?"
    return found


def data_fingerprint(prompts: PromptSet) -> str:
    """Changes when a prompt, its order or its answer does."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts.prompts:
        digest.update(json.dumps([prompt.id, prompt.token_ids, prompt.ground_truth]).encode())
    return digest.hexdigest()


# -- configuration ---------------------------------------------------------------------------------


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted keys and their values."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _defaults() -> dict[str, object]:
    return {
        f"{name}.{key}": inner.get_default(call_default_factory=True)
        for name, section in Config.model_fields.items()
        for key, inner in getattr(section.annotation, "model_fields", {}).items()
        if not inner.is_required()
    }


def changed_keys(saved: dict, now: dict) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, with (saved, now); a key that was not there yet counts as its default, any other
    that one side lacks as None."""
    before, after = _defaults() | flat(saved), flat(now)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _among(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name) for name in names)


def refuse_another_run(folder: Path, config: Config) -> None:
    """Holds ``config`` against the newest checkpoint of ``folder``, before anything is built. Pure file work, the same
    on every rank.

    Raises:
        ConfigError: it differs in what matters; names the keys with both values.
    """
    root = folder / "checkpoints"
    for step in reversed(folders.complete_steps(root)):
        try:
            state = RunState.from_json((root / folders.checkpoint_name(step) / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # damaged: found out, and set aside, when the contents are looked at
        changed = {
            key: values
            for key, values in changed_keys(state.config, config.model_dump(mode="json")).items()
            if not _among(key, _FREE + _LAYOUT) and key not in config.checkpoint.allow_changed
        }
        if changed:
            raise ConfigError(
                "\n".join(
                    [
                        f"output={folder} holds a run of another configuration: give another output, or the run's own"
                        " values, or name the keys in checkpoint.allow_changed"
                    ]
                    + [f"{key}: the run has {old!r}, this command {new!r}" for key, (old, new) in changed.items()]
                )
            )
        return


# -- finding the checkpoint ------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, or None, and sentences about what was found on the way."""

    path: Path | None
    state: RunState | None
    notes: list[str]


def find_run_checkpoint(folder: Path) -> Found:
    """The newest whole checkpoint of a run. Collective: ranks share the work of summing up its files."""
    root, notes, skipped = folder / "checkpoints", [], set()
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        notes += folders.remove_leftovers(root)
    while True:
        step = None
        if rank == 0:
            step = max(set(folders.complete_steps(root)) - skipped, default=None)
        answer, *_ = all_gather_on_host(json.dumps(step).encode())
        step = json.loads(answer)
        if step is None:
            return Found(None, None, notes)
        path = root / folders.checkpoint_name(step)
        problem, state = None, None
        try:
            manifest = folders.read_manifest(path)
            problem = folders.problem_of(path, sorted(manifest or {})[rank::world])
            if problem is None:
                state = RunState.from_json((path / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = str(error)
        problems = all_gather_on_host((problem or "").encode())
        problem = next((text.decode() for text in problems if text), None)
        if problem is None:
            return Found(path, state, notes)
        skipped.add(step)
        if rank == 0:
            try:
                what = f"set aside as {folders.set_aside(path).name}"
            except OSError as error:
                what = f"it cannot be set aside ({error.strerror or error})"
            notes.append(f"checkpoint {path.name} is damaged ({problem}): {what}, the one before is used")


def layout_note(state: RunState, config: Config, layout: dict) -> str | None:
    """A sentence where the resumed run is laid out otherwise than the one that saved; None where it will go on bit for
    bit."""
    changed = [k for k in changed_keys(state.config, config.model_dump(mode="json")) if _among(k, _LAYOUT)]
    changed += sorted(k for k in changed_keys(state.layout, layout))
    if changed:
        return (
            f"the layout is another ({', '.join(changed)}): the run goes on with the same state, equal up to rounding"
        )
    return None
