"""The memory plan of a run: bytes of every rank by formula, before a GPU is asked for. ``dcpo train --check`` prints it
and refuses what cannot fit.

    always            weights, the reference model of a KL term, the embedded engine's copy of the model, RESERVE
    while training    gradients, optimizer, activations, the larger of head and one layer's backward pass,
                      what a colocated server leaves on the GPU
    while sampling    a colocated server's share; or gradients, optimizer and the embedded engine's cache
    total             always + the larger of training and sampling

Formulas: :mod:`~dcpo_megatron.memory.states`, :mod:`~dcpo_megatron.memory.activations`, and those of
engine and server here. GB are 10^9 bytes. Not in it, because it comes when activations are gone: weights on their way
to servers (``publish.bucket_bytes``), and temporaries of the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dcpo_megatron.config.schema import Config
from dcpo_megatron.mcore.head.backend import takes_fused_head
from dcpo_megatron.mcore.layout import padded_vocab
from dcpo_megatron.mcore.platform import has_transformer_engine
from dcpo_megatron.memory.activations import Compute, chunk_passes, final_bytes, head_bytes, kept_bytes, working_bytes
from dcpo_megatron.memory.states import BYTES, model_elements, sharing_ranks, stage_chunks, state_bytes
from dcpo_megatron.rollout.serving.command import COLOCATED
from dcpo_megatron.training.checks import CheckedRun

GB = 10**9
# CUDA context, nccl's buffers, workspaces of libraries, holes of the allocator: assumed, not computed.
RESERVE = 4 * GB
# What a server keeps on its GPU with weights and cache released (context, captured graphs): assumed.
SERVER_REST = 3 * GB
# Routed tokens of the busiest expert-parallel rank over the mean: assumed.
BUSIEST_EXPERTS = 1.5
_SERVER_SHARE = float(COLOCATED[COLOCATED.index("--mem-fraction-static") + 1])


@dataclass(frozen=True)
class RankMemory:
    """Alike ranks of one pipeline stage (several stages where they need the same): bytes by part, in the order of the
    module's table.
    """

    first: int
    last: int
    stage: str
    passes: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The most that is held at a time."""

        def of(*parts: str) -> int:
            return sum(self.parts.get(part, 0) for part in parts)

        held = of("weights", "reference", "engine's model", "reserve")
        training = (
            held + of("gradients", "optimizer", "activations", "server's rest") + max(of("head"), of("one layer"))
        )
        # A colocated run has its optimizer on the host and no gradients while servers sample.
        sampling = (
            held + of("server's share")
            if "server's share" in self.parts
            else held + of("gradients", "optimizer", "engine's cache")
        )
        return max(training, sampling)

    @property
    def name(self) -> str:
        ranks = f"rank {self.first}" if self.first == self.last else f"ranks {self.first}-{self.last}"
        return f"{ranks}, {self.stage}" if self.stage else ranks


def planned_compute(run: CheckedRun) -> Compute:
    """What the run computes with. Where this machine has no GPU, a plan for GPUs takes Transformer Engine's layers for
    granted, unless the configuration says cpu.
    """
    config, shape = run.config, run.shape
    on_cpu = config.training.platform == "cpu"
    engine = config.model.dtype == "bfloat16" and config.model.transformer_engine != "off" and not on_cpu
    if engine and not run.platform.is_cpu:
        engine = has_transformer_engine()
    rows = padded_vocab(shape.vocab, run.layout.tensor) // run.layout.tensor
    model = config.model
    return Compute(
        dtype=model.dtype,
        layers="transformer-engine" if engine else "local",
        device="cpu" if on_cpu else "cuda",
        recompute=model.recompute,
        fused_head=takes_fused_head(model.fused_head_loss, run.objective.ratio_level, rows, shape.hidden, model.dtype),
        chunk_tokens=model.head_chunk_tokens,
        busiest_experts=BUSIEST_EXPERTS if run.layout.expert > 1 else 1.0,
    )


def plan_memory(run: CheckedRun, gpu_bytes: int = 80 * GB) -> list[RankMemory]:
    """Bytes of every rank, alike ranks together, stage by stage. ``gpu_bytes``: of which a colocated server takes its
    share.
    """
    groups: list[RankMemory] = []
    ranks = run.world_size // run.layout.pipeline
    for stage in range(run.layout.pipeline):
        parts = _stage_parts(run, stage, gpu_bytes)
        passes = chunk_passes(run.layout, stage)
        # Megatron-Core lays pipeline stages out last: each is a block of consecutive ranks.
        first, last = stage * ranks, (stage + 1) * ranks - 1
        if groups and (groups[-1].parts, groups[-1].passes) == (parts, passes):
            name = f"{groups[-1].stage.split('-')[0].replace('stage ', 'stages ')}-{stage}"
            groups[-1] = replace(groups[-1], last=last, stage=name)
        else:
            groups.append(RankMemory(first, last, f"stage {stage}" if run.layout.pipeline > 1 else "", passes, parts))
    return groups


def _stage_parts(run: CheckedRun, stage: int, gpu_bytes: int) -> dict[str, int]:
    config, shape, layout = run.config, run.shape, run.layout
    compute = planned_compute(run)
    chunks = stage_chunks(shape, layout, stage)
    weights, gradients, optimizer = state_bytes(
        chunks, sharing_ranks(shape, layout, run.world_size), config.model.dtype, config.optimizer.name
    )
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    if run.objective.kl_coef:
        parts["reference"] = compute.width * sum(chunk.elements for chunk in chunks)
    if config.rollout.engine == "embedded":
        parts["engine's model"], cache = embedded_bytes(run)
    tokens = config.training.micro_batch_tokens // layout.context
    parts["activations"] = kept_bytes(shape, layout, compute, tokens, stage)
    if stage == layout.pipeline - 1:
        # Prompts count too: how many of a micro-batch's tokens are a response's is not known before.
        parts["activations"] += final_bytes(shape, layout, compute, tokens, tokens)
        parts["head"] = head_bytes(shape, layout, compute, tokens)
    parts["one layer"] = working_bytes(shape, layout, compute, tokens)
    if config.rollout.engine == "embedded":
        parts["engine's cache"] = cache
    elif config.publish.colocated:
        parts["server's rest"] = SERVER_REST
        parts["server's share"] = SERVER_REST + int(_SERVER_SHARE * gpu_bytes)
    if compute.device == "cuda":
        parts["reserve"] = RESERVE
    return parts


def cache_token_bytes(run: CheckedRun) -> int:
    """Key-value cache of one token in all layers of the whole model: 2 x layers x key-value heads x head_dim x w."""
    shape = run.shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[run.config.model.dtype]


def embedded_bytes(run: CheckedRun) -> tuple[int, int]:
    """``(model, cache)`` of the embedded engine on each rank, whatever the layout: w x all elements; and while it
    samples b responses of up to S tokens together

    b S x cache_token_bytes x (1 + 1 / layers)    a layer's cache is copied when it grows by a token
    + 45 b V                              logits, log-probs, and the cumulative distribution in float64 with its search
    """
    rollout, shape = run.config.rollout, run.shape
    everything, _ = model_elements(shape)
    responses = -(-rollout.prompts_per_step * rollout.group_size // run.world_size)
    batch = min(rollout.batch_size, responses)
    longest = run.config.data.max_prompt_tokens + rollout.max_response_tokens
    cache = batch * longest * cache_token_bytes(run) * (shape.layers + 1) // shape.layers
    return BYTES[run.config.model.dtype] * everything, cache + 45 * batch * shape.vocab


# -- what is said ----------------------------------------------------------------------------------------------------


def memory_text(run: CheckedRun, groups: list[RankMemory]) -> str:
    """The plan as lines for a person: a table in GB, what it was computed for, what was assumed."""
    compute = planned_compute(run)
    # The last stage has every part that an earlier one has.
    names = list(groups[-1].parts)
    rows = [["", *names, "total"]]
    rows += [[group.name, *(_gb(group.parts.get(name)) for name in names), _gb(group.total)] for group in groups]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    where = "a rank" if compute.device == "cpu" else "a GPU"
    layers = "Transformer Engine's layers" if compute.layers == "transformer-engine" else "local layers"
    passes = ", ".join(str(group.passes) for group in groups)
    unit = "passes of a chunk" if run.layout.interleaved else "micro-batches"
    said = [
        (
            f"memory of {where} in GB (10^9 bytes), planned by formula, not measured: {layers},"
            f" {run.config.model.dtype}, recompute {compute.recompute},"
            f" {'fused' if compute.fused_head else 'recomputing'} head,"
        ),
        f"micro-batches of {run.config.training.micro_batch_tokens} tokens, {unit} kept by each line: {passes}",
        *table,
        "total: of head and one layer the larger counts, and of training and sampling",
    ]
    if compute.busiest_experts > 1:
        said.append(
            f"assumed: the busiest expert-parallel rank gets {compute.busiest_experts:g} times the mean of the routed"
            " tokens"
        )
    return "\n".join(said)


def memory_problems(run: CheckedRun, gpu_bytes: int) -> list[str]:
    """A sentence for every group of ranks that does not fit: how much is missing, the largest part, and what would
    help.
    """
    found = []
    for group in plan_memory(run, gpu_bytes):
        if group.total <= gpu_bytes:
            continue
        largest = max((part for part in group.parts if part != "reserve"), key=lambda part: group.parts[part])
        sentence = (
            f"{group.name}: {_gb(group.total)} GB are needed, a GPU has {_gb(gpu_bytes)}; the largest part is {largest}"
            f" ({_gb(group.parts[largest])} GB)"
        )
        helps = [f"{said} ({_gb(total)} GB)" for said, total in _helps(run, gpu_bytes, group.total)]
        found.append(f"{sentence}. Would help: {', '.join(helps) or 'more ranks of tensor or pipeline parallelism'}")
    return found


def _helps(run: CheckedRun, gpu_bytes: int, total: int) -> Iterator[tuple[str, int]]:
    """Single changes after which the most loaded rank needs less, and what it then needs."""
    config, layout = run.config, run.layout
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    fewer = max(longest, config.training.micro_batch_tokens // 2)
    tried: list[dict[str, dict]] = [
        {"model": {"recompute": "full"}},
        {"training": {"micro_batch_tokens": fewer}},
        {"parallel": {"tensor": layout.tensor * 2, "sequence_parallel": True}},
        {"parallel": {"pipeline": layout.pipeline * 2}},
    ]
    if layout.tensor > 1 and not layout.sequence_parallel:
        tried.insert(2, {"parallel": {"sequence_parallel": True}})
    if run.shape.experts:
        tried.append({"parallel": {"expert": layout.expert * 2}})
    if config.rollout.engine == "embedded":
        tried += [
            {"rollout": {"batch_size": max(1, config.rollout.batch_size // 2)}},
            {"rollout": {"engine": "sglang"}},
        ]
    for changes in tried:
        other = _changed(run, changes)
        if other is None:
            continue
        needed = max(group.total for group in plan_memory(other, gpu_bytes))
        if needed < total:
            said = " ".join(
                f"{section}.{key}={_yaml(value)}" for section, keys in changes.items() for key, value in keys.items()
            )
            yield said, needed


def _changed(run: CheckedRun, changes: dict[str, dict]) -> CheckedRun | None:
    """The run with other values; None where they change nothing or the layout cannot be had."""
    sections = {name: getattr(run.config, name).model_copy(update=keys) for name, keys in changes.items()}
    config: Config = run.config.model_copy(update=sections)
    layout = replace(run.layout, **changes.get("parallel", {}))
    if config == run.config or layout.problems(run.shape, run.world_size, config.parallel.overlap_p2p):
        return None
    # A minibatch is dealt evenly to the data-parallel ranks.
    if config.training.minibatch_prompts * config.rollout.group_size % layout.data_parallel(run.world_size):
        return None
    return replace(run, config=config, layout=layout)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / GB:.1f}" if size >= GB / 2 else f"{size / GB:.2f}"
