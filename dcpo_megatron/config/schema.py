"""The configuration of a run: its sections and their keys, typed, each with a description.

:func:`~dcpo_megatron.config.loading.load_config` makes a :class:`Config` of files and words of the command line and
checks types; :func:`~dcpo_megatron.training.checks.check_run` holds it against the model, the files and the number of
ranks. Both raise :class:`ConfigError` with every reason they found, before the first GPU second.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dcpo_megatron.config.unknown import unknown_key
from dcpo_megatron.objectives import Objective, get_preset


class ConfigError(ValueError):
    """The configuration cannot run; the message has one line a reason."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    path: str = Field(
        description=(
            "Hugging Face folder (config.json, safetensors weights, tokenizer), or a Megatron checkpoint that"
            " carries one"
        )
    )
    weights: str | None = Field(
        None,
        description=(
            "start from these weights instead: a Hugging Face folder or a Megatron checkpoint of the same model, in any"
            " layout"
        ),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of weights and activations; gradients and optimizer state are fp32"
    )
    transformer_engine: Literal["auto", "on", "off"] = Field(
        "auto", description="layers of Transformer Engine: for bfloat16 where it imports on a GPU, demanded, or never"
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="recompute each layer's activations in the backward pass"
    )
    head: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="log-probs from hidden states: Triton kernels where Triton imports on a GPU, or plain PyTorch",
    )
    head_chunk_tokens: int = Field(1024, ge=1, description="tokens whose logits exist at a time, at most")
    fused_head_loss: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "gradients formed in the head's forward pass where the objective has a ratio per token; auto: where that"
            " holds at most 1 GiB"
        ),
    )
    bias_activation_fusion: Literal["auto", "on", "off"] = Field(
        "auto", description="a feed-forward layer's activation in one kernel; auto: on a GPU where Triton compiles"
    )
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "weights' gradients added up by the products themselves; auto: on a GPU with Transformer Engine's layers or"
            " Apex's kernel"
        ),
    )
    grouped_experts: Literal["auto", "on", "off"] = Field(
        "auto", description="one product for all experts of a rank; auto: with Transformer Engine's layers"
    )
    moe_permute_fusion: Literal["auto", "on", "off"] = Field(
        "auto", description="tokens go to their experts in one kernel; auto: with Transformer Engine's layers on a GPU"
    )

    @field_validator(
        "transformer_engine",
        "fused_head_loss",
        "bias_activation_fusion",
        "gradient_accumulation_fusion",
        "grouped_experts",
        "moe_permute_fusion",
        mode="before",
    )
    @classmethod
    def _words_of_yaml(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare on and off as booleans.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class ParallelSection(Section):
    tensor: int = Field(1, ge=1, description="tensor-parallel ranks")
    pipeline: int = Field(1, ge=1, description="pipeline-parallel ranks")
    virtual_pipeline: int | None = Field(None, ge=1, description="model chunks a pipeline rank holds")
    first_stage_layers: int | None = Field(
        None, ge=1, description="layers of the first pipeline stage (default: as the other stages)"
    )
    last_stage_layers: int | None = Field(
        None, ge=1, description="layers of the last pipeline stage (default: as the other stages)"
    )
    context: int = Field(1, ge=1, description="context-parallel ranks")
    expert: int = Field(1, ge=1, description="expert-parallel ranks")
    expert_tensor: int | None = Field(None, ge=1, description="tensor-parallel ranks of an expert (default: tensor)")
    sequence_parallel: bool = Field(False, description="split norms and residuals over tensor ranks along the sequence")
    overlap_p2p: bool = Field(
        True, description="overlapped stage-to-stage communication; needed by virtual pipelines with pipeline=2"
    )
    overlap_grad_reduce: Literal["auto", "on", "off"] = Field(
        "auto", description="gradients travel while the backward pass goes on; auto: on a GPU"
    )
    overlap_param_gather: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "updated weights travel while the next forward pass goes on; auto: on a GPU, with overlap_grad_reduce and"
            " Adam"
        ),
    )
    token_dispatcher: Literal["alltoall", "allgather", "flex"] = Field(
        "alltoall",
        description=(
            "how tokens reach their experts' ranks; flex needs DeepEP, allgather as many tokens on every rank that"
            " shares experts"
        ),
    )

    @field_validator("overlap_grad_reduce", "overlap_param_gather", mode="before")
    @classmethod
    def _words_of_yaml(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    def layout(self) -> dict[str, Any]:
        """The fields of :class:`~dcpo_megatron.mcore.layout.ParallelLayout`: sizes, not how ranks talk."""
        talk = {"overlap_p2p", "overlap_grad_reduce", "overlap_param_gather", "token_dispatcher"}
        return self.model_dump(exclude=talk)


class DataSection(Section):
    files: list[str] = Field(min_length=1, description="verl-style parquet, jsonl or GSM8K files")
    format: Literal["auto", "verl-parquet", "jsonl", "gsm8k"] = Field(
        "auto", description="auto | verl-parquet | jsonl | gsm8k"
    )
    prompt_key: str | None = Field(None, description="dotted path of the prompt column")
    answer_key: str | None = Field(None, description="dotted path of the ground truth")
    id_key: str | None = Field(
        None, description='dotted path of the stable id; "content" derives it from the prompt\'s text'
    )
    template: Literal["auto", "chat", "qwen-math", "plain"] = Field(
        "auto", description="auto | chat | qwen-math | plain"
    )
    system_prompt: str | None = Field(None, description="replaces the row's system message; empty removes it")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are bad rows")
    on_bad_row: Literal["error", "skip"] = Field(
        "skip", description="rows without id, answer or a prompt within the limit"
    )
    on_duplicate_id: Literal["error", "first"] = Field(
        "error", description="rows with the same id, question and answer"
    )
    limit: int | None = Field(None, ge=1, description="stop after so many prompts")


class RolloutSection(Section):
    engine: Literal["embedded", "sglang"] = Field(
        "embedded",
        description="what samples: transformers inside the trainer, or SGLang servers (see the servers section)",
    )
    prompts_per_step: int = Field(512, ge=1, description="prompts sampled a step")
    group_size: int = Field(16, ge=1, description="responses a prompt, G")
    max_response_tokens: int = Field(3072, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: the whole vocabulary")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="tokens that end a response, beside the model's own end-of-text tokens"
    )
    batch_size: int = Field(256, ge=1, description="responses the embedded engine decodes together")
    max_sampling_rounds: int = Field(
        10, ge=1, description="dynamic sampling: rounds of prompts_per_step before the step goes on with what it has"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description=(
            "0: strictly on-policy; 1: the next batch is sampled while this one trains (engine sglang), its tokens at"
            " most one version old"
        ),
    )
    max_mismatch: float | None = Field(
        0.2,
        gt=0,
        description=(
            "stops the run where |training log-prob - rollout log-prob| of the batch, on average over tokens of the"
            " current weights, is above it; null: never"
        ),
    )


class ServersSection(Section):
    urls: list[str] = Field(default_factory=list, description="SGLang servers, such as http://127.0.0.1:30000")
    file: str | None = Field(
        None, description="a file that `dcpo serve` writes, or a folder of them: the servers' addresses"
    )
    count: int | None = Field(
        None, ge=1, description="with servers.file: wait until so many servers are listed; null: one is enough"
    )
    router: str | None = Field(
        None, description="requests go through this sglang-router; weights still go to each server"
    )
    api_key_file: str | None = Field(
        None, description="file with the servers' key (default: the variable DCPO_SGLANG_API_KEY)"
    )
    min_healthy: int = Field(1, ge=1, description="servers that must take each new weight version for the run to go on")
    start_timeout_seconds: float = Field(
        600.0, gt=0, description="deadline for servers to answer, at the start and after all of them were gone"
    )
    request_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="seconds without a sign of work from a server until it is asked whether it still samples",
    )

    @field_validator("urls", mode="before")
    @classmethod
    def _ipv6_in_yaml(cls, value: Any) -> Any:
        # [http://[::1]:30000] without quotes is no list for YAML.
        if isinstance(value, str) and value.startswith("[http") and value.endswith("]"):
            return [url.strip(" '\"") for url in value[1:-1].split(",")]
        return value


class PublishSection(Section):
    mode: Literal["distributed", "disk", "ipc"] = Field(
        "distributed",
        description=(
            "how weights reach the servers: a process group, files that both sides see, or CUDA IPC on the same GPUs"
        ),
    )
    bucket_bytes: int = Field(512 * 1024**2, ge=1, description="weights on their way at a time, at most")
    timeout_seconds: float = Field(600.0, gt=0, description="deadline of each phase of a publication")
    bucket_timeout_seconds: float = Field(120.0, gt=0, description="deadline of one bucket at one server")
    address: str | None = Field(
        None,
        description=(
            "how servers reach rank 0 (mode distributed; default: loopback for servers on it, else this host's address)"
        ),
    )
    folder: str | None = Field(
        None, description="mode disk: where servers read the weights (default: OUTPUT/published)"
    )
    verify: bool = Field(True, description="new weights are checked by checksum or log-probs before they are used")
    tolerance: float | None = Field(
        None,
        gt=0,
        description=(
            "mean |log-prob difference| that the check by log-probs allows (default: 1e-3 for float32, 0.1 for"
            " bfloat16)"
        ),
    )
    colocated: bool = Field(
        False, description="servers share the trainer's GPUs: their memory is released while training goes on"
    )

    @field_validator("address", mode="before")
    @classmethod
    def _ipv6_in_yaml(cls, value: Any) -> Any:
        # [fd00::2] without quotes is a list for YAML.
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class RewardSection(Section):
    function: str = Field("math", description="math, or a Python function by dotted path (package.module:function)")
    timeout_seconds: float = Field(5.0, gt=0, description="limit for one response")
    failure_reward: float = Field(0.0, description="reward of a response on which the function failed")
    workers: int = Field(1, ge=1, description="reward processes a rank")
    correct_at: float = Field(1.0, description="a response with at least this reward counts as correct")


class OptimizerSection(Section):
    name: Literal["adam", "sgd"] = Field("adam", description="AdamW with decoupled weight decay, or plain SGD")
    lr: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(
        10, ge=0, description="training steps over which the learning rate rises linearly; constant after"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")


class TrainingSection(Section):
    steps: int = Field(400, ge=0)
    minibatch_prompts: int = Field(32, ge=1, description="prompts an optimizer update")
    micro_batch_tokens: int = Field(16384, ge=1, description="token budget of a micro-batch")
    packing: Literal["packed", "padded"] = Field("packed", description="sequences end to end in one row, or one a row")
    seed: int = Field(0, ge=0)
    platform: Literal["auto", "cuda", "cpu"] = "auto"
    timeout_seconds: float = Field(
        1800.0,
        gt=0,
        le=1e6,
        description=(
            "deadline of every phase of a step and of every collective (whole minutes, rounded up, within a model's"
            " ranks)"
        ),
    )
    start_timeout_seconds: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="deadline for all ranks to start; null: 600, or timeout_seconds where that is more",
    )
    max_bad_steps: int = Field(
        5, ge=0, description="steps in a row with an update left out as not finite, after which the run stops; 0: never"
    )
    save_every: int = Field(0, ge=0, description="write a Hugging Face folder every N steps; 0: at the end only")


class CheckpointSection(Section):
    every: int = Field(
        50,
        ge=0,
        description="write a checkpoint of the whole run every N steps, and at the end; 0: none, a killed run is lost",
    )
    keep_last: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of N steps stay too; 0: none")
    asynchronous: bool = Field(True, description="training goes on while a checkpoint is written")
    timeout_seconds: float = Field(3600.0, gt=0, description="deadline of a checkpoint's writing")
    allow_changed: list[str] = Field(
        default_factory=list, description="keys that may differ from the configuration of the run that is resumed"
    )


class EvaluationSection(Section):
    files: list[str] = Field(default_factory=list, description="held-out prompts; none: no evaluation")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after training only")
    samples: int = Field(8, ge=1, description="responses a prompt at `temperature`; one more is greedy")
    temperature: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1, description="prompts used")
    on_duplicate_id: Literal["error", "first"] = "first"


class LoggingSection(Section):
    console: bool = Field(True, description="one line a step")
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "dcpo"
    report: bool = Field(True, description="report.png at the end")
    samples: int = Field(20, ge=0, description="keep a few responses, token by token, every N steps; 0: none")
    prometheus_port: int | None = Field(
        None, ge=1, le=65535, description="rank 0 serves the last metrics at http://127.0.0.1:PORT/metrics"
    )


class Config(Section):
    """The whole run. ``objective`` holds ``preset`` and any field of :class:`Objective` that replaces the preset's."""

    model: ModelSection
    data: DataSection
    output: str = Field("runs/dcpo", description="folder of the run: metrics, summary, report, the trained model")
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    servers: ServersSection = Field(default_factory=ServersSection)
    publish: PublishSection = Field(default_factory=PublishSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    objective: dict[str, Any] = Field(default_factory=lambda: {"preset": "dcpo-paper"})
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)

    def make_objective(self) -> Objective:
        """The objective that the section asks for. Raises ConfigError."""
        settings = dict(self.objective)
        try:
            preset = get_preset(str(settings.pop("preset", "dcpo-paper")))
            known = {field.name for field in dataclasses.fields(Objective)}
            for key in settings:
                if key not in known:
                    raise ConfigError(
                        unknown_key(f"objective.{key}", [f"objective.{name}" for name in ("preset", *sorted(known))])
                    )
            return dataclasses.replace(preset, **settings)
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"objective: {error}") from None
