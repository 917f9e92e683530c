"""Builds what one rank of a run holds: process groups, data, model, optimizer, engine, and what a checkpoint brings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.checkpoint.resume import Found, data_fingerprint, find_run_checkpoint, refuse_another_run
from dcpo_megatron.checkpoint.saver import CheckpointSaver
from dcpo_megatron.checkpoint.snapshot import restore
from dcpo_megatron.config.loading import to_yaml
from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.data import DataError, PromptOptions, PromptSampler, load_prompts
from dcpo_megatron.data.packing import PackingOptions
from dcpo_megatron.launch.signals import Stopped
from dcpo_megatron.mcore import platform as platforms
from dcpo_megatron.mcore.head.backend import missing_for_triton
from dcpo_megatron.mcore.layout import alignment, make_groups, rank_position, sequence_alignment
from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.monitor.bad_steps import BadSteps
from dcpo_megatron.monitor.gpu import GpuMonitor
from dcpo_megatron.monitor.reach import Door
from dcpo_megatron.monitor.samples import SampleLog
from dcpo_megatron.monitor.sinks import Sinks
from dcpo_megatron.monitor.watchdog import Watchdog, WatchedTimeline, collective_timeout
from dcpo_megatron.rewards import Rewarder
from dcpo_megatron.rollout import RolloutEngine, SamplingParams
from dcpo_megatron.training.checkpoints import resume
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.engines import make_engine, settle_interface, settle_nccl
from dcpo_megatron.training.first_meeting import hold_first_meeting
from dcpo_megatron.training.loop import Trainer
from dcpo_megatron.training.minibatches import MinibatchMaker, gather_data_ranks
from dcpo_megatron.training.parts import Monitors, RunData
from dcpo_megatron.training.placement import placement_warning
from dcpo_megatron.training.rollout_phase import RolloutPhase
from dcpo_megatron.training.tokenizer import load_tokenizer, stop_token_ids
from dcpo_megatron.weights.transfer import WeightGatherer, load_weights

# For ranks that have started to compare what they run, and to make their groups.
_MEETING_SECONDS = 120.0


def build_trainer(
    run_: CheckedRun, stop_requested: Callable[[], bool] = lambda: False, watchdog: Watchdog | None = None
) -> Trainer:
    """Starts the process groups and builds data, model, optimizer and engine. Raises the errors of each part.

    ``watchdog``: one that the caller asks when this fails; it is started here. ``stop_requested``: whether this rank
    has been asked to stop; looked at while waiting for servers, now (Stopped is raised) and in the run.
    """
    config = run_.config
    folder = _writable(Path(config.output))
    refuse_another_run(folder, config)
    data = _read_data(run_)
    rewarder = Rewarder(
        config.reward.function, config.reward.timeout_seconds, config.reward.failure_reward, config.reward.workers
    )
    fingerprint = data_fingerprint(data.prompts)
    watchdog, warning = _join_ranks(run_, folder, fingerprint, stop_requested, watchdog)
    found = find_run_checkpoint(folder)
    if found.state is not None and found.state.data != fingerprint:
        raise ConfigError(
            f"output={folder} holds a run on other prompts than data.files now gives: bring the run's own data, or give"
            " another output"
        )
    policy, reference = _make_models(run_, found)
    gatherer = WeightGatherer(policy)
    resumed = found.state.step if found.state else None
    monitors = _make_monitors(run_, folder, policy, data, watchdog, resumed)
    sinks = monitors.sinks
    if warning is not None:
        sinks.announce(warning)
    if (misplaced := placement_warning(policy.position)) is not None:
        sinks.warn(misplaced)
    try:
        engine = make_engine(
            run_,
            policy,
            gatherer,
            data.prompts,
            step=resumed or 0,
            restored=found.path is not None or run_.weights != run_.hf_folder,
            announce=sinks.announce,
            tick=watchdog.progress,
            stop=stop_requested,
        )
    except Stopped:
        rewarder.close()
        watchdog.close("stopped")
        raise
    for held in filter(None, (policy, reference)):
        held.span = monitors.timeline.span
    trainer = Trainer(
        run_,
        folder,
        data,
        policy,
        reference,
        gatherer,
        engine,
        _make_phase(run_, data, engine, rewarder, monitors),
        _make_minibatches(run_, policy, monitors),
        CheckpointSaver(
            folder / "checkpoints",
            run_.hf_folder,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            timeout=config.checkpoint.timeout_seconds,
            device=run_.platform.device,
        ),
        monitors,
    )
    if config.model.head == "auto" and not run_.platform.is_cpu and (missing := missing_for_triton("cuda")):
        sinks.announce(f"model.head=auto takes plain PyTorch: {missing}")
    for note in found.notes:
        sinks.announce(note)
    if found.path is not None and found.state is not None:
        resume(trainer, found.path, found.state)
    return trainer


def _read_data(run_: CheckedRun) -> RunData:
    """Tokenizer, prompts and held-out prompts. Raises DataError, and ConfigError where a step wants more prompts."""
    config = run_.config
    tokenizer = load_tokenizer(run_.hf_folder, run_.shape.vocab)
    stops = stop_token_ids(run_.hf_folder, tokenizer, config.rollout.stop_token_ids)
    prompts = load_prompts(config.data.files, tokenizer, PromptOptions(**config.data.model_dump(exclude={"files"})))
    held_out = None
    if config.evaluation.files:
        options = config.data.model_dump(exclude={"files"}) | {
            "limit": config.evaluation.limit,
            "on_duplicate_id": config.evaluation.on_duplicate_id,
        }
        try:
            held_out = load_prompts(config.evaluation.files, tokenizer, PromptOptions(**options))
        except DataError as error:
            raise DataError(f"evaluation.files: {error}") from None
    if config.rollout.prompts_per_step > len(prompts):
        raise ConfigError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}, but data.files hold {len(prompts)} usable"
            " prompts: lower it or bring more prompts"
        )
    return RunData(tokenizer, stops, prompts, held_out, PromptSampler(len(prompts), config.training.seed))


def _join_ranks(
    run_: CheckedRun,
    folder: Path,
    fingerprint: str,
    stop_requested: Callable[[], bool],
    watchdog: Watchdog | None,
) -> tuple[Watchdog, str | None]:
    """The process groups, once all ranks were found to run the same; the watchdog, started, and what settling nccl had
    to say."""
    config = run_.config
    timeout = collective_timeout(config.training.timeout_seconds)
    warning = settle_nccl(config, run_.platform.is_cpu)

    def tick() -> None:
        if stop_requested():
            raise Stopped

    platforms.start(run_.platform, timeout, config.training.start_timeout_seconds, tick)
    settle_interface(config, run_.platform.is_cpu)
    if watchdog is None:
        watchdog = Watchdog(folder, dist.get_rank(), dist.get_world_size(), config.training.timeout_seconds)
    watchdog.start()
    # Groups are made through the store of rank 0's host, which has no deadline where the network is silent.
    watchdog.enter("start", 0, max(config.training.timeout_seconds, _MEETING_SECONDS))
    watchdog.door = Door()
    try:
        watchdog.peers = hold_first_meeting(config, fingerprint, watchdog.door)
        make_groups(run_.layout, timeout_minutes=math.ceil(timeout / 60))
    finally:
        watchdog.enter("start", 0, math.inf)
    return watchdog, warning


def _make_models(run_: CheckedRun, found: Found) -> tuple[PolicyModel, PolicyModel | None]:
    """The policy with its optimizer, as the checkpoint has them where there is one, and the reference model where the
    objective has a KL term."""
    config, position = run_.config, rank_position()
    options = ModelOptions(
        dtype=config.model.dtype,
        transformer_engine=config.model.transformer_engine,
        recompute=config.model.recompute,
        overlap_p2p=config.parallel.overlap_p2p,
        bias_activation_fusion=config.model.bias_activation_fusion,
        gradient_accumulation_fusion=config.model.gradient_accumulation_fusion,
        grouped_experts=config.model.grouped_experts,
        moe_permute_fusion=config.model.moe_permute_fusion,
        token_dispatcher=config.parallel.token_dispatcher,
    )

    def model(weights: bool) -> PolicyModel:
        made = PolicyModel.create(
            run_.shape, run_.layout, options, run_.platform, position,
            seed=config.training.seed,
            temperature=config.rollout.temperature,
            packed=config.training.packing == "packed",
            head_chunk_tokens=config.model.head_chunk_tokens,
            head=config.model.head,
            fused_head_loss=config.model.fused_head_loss,
        )  # fmt: skip
        if weights:
            load_weights(made, run_.weights)
        return made

    policy = model(weights=found.path is None)
    reference = model(weights=True) if run_.objective.kl_coef else None
    settings = config.optimizer.model_dump(exclude={"warmup_steps"})
    overlap = config.parallel.model_dump(include={"overlap_grad_reduce", "overlap_param_gather"})
    policy.make_trainable(OptimizerOptions(**settings, **overlap))
    if found.path is not None:
        restore(policy, found.path)
    return policy, reference


def _make_monitors(
    run_: CheckedRun, folder: Path, policy: PolicyModel, data: RunData, watchdog: Watchdog, resumed: int | None
) -> Monitors:
    """Rank 0 also writes ``config.yaml``. ``resumed``: the step of the checkpoint that the run goes on from."""
    config, is_writer = run_.config, dist.get_rank() == 0
    if is_writer:
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    sinks = Sinks(config, folder, is_writer, config.training.steps, resumed)
    return Monitors(
        sinks,
        GpuMonitor(run_.platform),
        watchdog,
        WatchedTimeline(watchdog),
        BadSteps(folder, config.training.max_bad_steps, is_writer),
        SampleLog(
            folder, config.logging.samples, policy.position, [prompt.id for prompt in data.prompts.prompts],
            sinks.announce, resumed,
        ),
    )  # fmt: skip


def _make_phase(
    run_: CheckedRun, data: RunData, engine: RolloutEngine, rewarder: Rewarder, monitors: Monitors
) -> RolloutPhase:
    config, objective = run_.config, run_.objective
    return RolloutPhase(
        engine=engine,
        tokenizer=data.tokenizer,
        rewarder=rewarder,
        objective=objective,
        history=RewardHistory(objective.std_ddof) if objective.advantage == "sas" else None,
        sampling=SamplingParams(
            config.rollout.max_response_tokens,
            config.rollout.temperature,
            config.rollout.top_p,
            config.rollout.top_k,
            data.stop_token_ids,
        ),
        group_size=config.rollout.group_size,
        correct_at=config.reward.correct_at,
        seed=config.training.seed,
        timeline=monitors.timeline,
        whole_prompts=config.rollout.engine == "sglang",
    )


def _make_minibatches(run_: CheckedRun, policy: PolicyModel, monitors: Monitors) -> MinibatchMaker:
    """Collective over all ranks."""
    config, layout, position = run_.config, run_.layout, policy.position
    return MinibatchMaker(
        run_.objective,
        PackingOptions(
            max_tokens=config.training.micro_batch_tokens,
            packed=policy.packed,
            align=sequence_alignment(layout.context),
            attention_length=6 * run_.shape.hidden,
            row_align=alignment(layout.tensor, layout.context, layout.sequence_parallel),
        ),
        prompts=config.training.minibatch_prompts,
        max_response_tokens=config.rollout.max_response_tokens,
        # The interleaved schedule wants a multiple of the pipeline size.
        multiple_of=position.pipeline_size if layout.interleaved else 1,
        data_rank=position.data_rank,
        data_ranks=gather_data_ranks(position),
        timeline=monitors.timeline,
    )


def _writable(folder: Path) -> Path:
    """``folder``, made if need be. Raises ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output={folder} cannot be made ({error.strerror}): name a folder that can be written"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output={folder} is not writable: name a folder that can be written")
    return folder
