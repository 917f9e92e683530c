"""The rollout engine that the configuration names, with the weights of the run's start in it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dcpo_megatron.data import PromptSet
from dcpo_megatron.mcore.collectives import all_gather_bytes
from dcpo_megatron.mcore.model import DTYPES
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.rollout import EmbeddedEngine, RolloutEngine
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.config import Config, ConfigError
from dcpo_megatron.training.probe import TrainingProbe
from dcpo_megatron.weights.transfer import WeightGatherer

API_KEY_VARIABLE = "DCPO_SGLANG_API_KEY"


def make_engine(
    run_: CheckedRun,
    policy: PolicyModel,
    gatherer: WeightGatherer,
    prompts: PromptSet,
    *,
    step: int,
    restored: bool,
    announce: Callable[[str], None],
    tick: Callable[[], None],
) -> RolloutEngine:
    """Collective over all ranks; the engine samples with the weights of ``policy``, as version ``step``.

    Args:
        restored: ``policy`` does not hold the weights of ``run_.hf_folder``.
        announce: says things on the rank that writes.
        tick: called while waiting for servers.

    Raises:
        RolloutError: servers that do not answer, or do not take the weights.
        ConfigError: an address or key that cannot be used.
    """
    if run_.config.rollout.engine == "sglang":
        return _server_engine(run_, policy, gatherer, prompts, step, announce, tick)
    engine = EmbeddedEngine(
        run_.hf_folder,
        device=run_.platform.device,
        dtype=DTYPES[run_.config.model.dtype],
        max_batch=run_.config.rollout.batch_size,
        load=not restored,
    )
    if restored:
        engine.load_weights(gatherer, version=step)
    return engine
