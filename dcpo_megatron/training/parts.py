"""What one rank of a run holds, in three groups: what it trains on, who looks on, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcpo_megatron.data import PromptSampler, PromptSet
from dcpo_megatron.monitor.bad_steps import BadSteps
from dcpo_megatron.monitor.gpu import GpuMonitor
from dcpo_megatron.monitor.samples import SampleLog
from dcpo_megatron.monitor.sinks import Sinks
from dcpo_megatron.monitor.watchdog import Watchdog, WatchedTimeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RunData:
    """``stop_token_ids`` end a response; ``held_out``: the prompts of evaluations, None where there are none."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    prompts: PromptSet
    held_out: PromptSet | None
    sampler: PromptSampler


@dataclass
class Monitors:
    """Who sees, times and tells what the run does, and ends it where it stands still."""

    sinks: Sinks
    gpu: GpuMonitor
    watchdog: Watchdog
    timeline: WatchedTimeline
    bad_steps: BadSteps
    samples: SampleLog


@dataclass
class RunProgress:
    """How far the run is: what a checkpoint keeps, and what the summary tells.

    Attributes:
        step: the last one that was done before this process began.
        updates: done since the run began.
        seconds: of training since the run began, evaluations and copies left out.
        evaluations: results by step.
        metrics: of every step, as far as ``metrics.jsonl`` has them.
        saved_step: of the last complete checkpoint.
    """

    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    saved_step: int = 0
