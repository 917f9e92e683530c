"""Where the time of a step would go: an estimate from the sizes of model and batch and a card's numbers. Nothing here
was measured.

With N the elements that a token meets, T tokens of the batch (R responses of p + r tokens), g GPUs, Q = heads x
head_dim, L layers:

    forward of a token      2 N + 2 L Q (p + r) flops; causal attention looks at half of the sequence on average
    old log-probs           T x forward / (g x peak x MFU), once more with a reference model; none of their own where
                            the step's only update gives them
    forward and backward    T x 3 forward (4 with recomputation) / (g x peak x MFU)
                            x (1 + (stages - 1) / (chunks x micro-batches)), the pipeline's bubble; old log-probs too
    optimizer               for each update 30 bytes of every element that the rank owns and 8 of every one that it
                            holds go through memory; 4 (gradients) and 2 (weights) over the wire
    decoding, b together    a step reads weights and cache (b x (p + r / 2) tokens) or computes b x 2 N flops at half
                            the peak, whichever takes longer, and has an overhead
    rollout                 R r tokens at b / that time on each GPU, or the longest response alone, whichever is longer
    publish                 weights over the wire twice (gathered, sent), and two seconds of pause and checks

Not in it: uneven lengths between ranks, dispatch of experts, rewards, checkpoints, evaluation, host work of small
models.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcpo_megatron.memory.plan import cache_token_bytes
from dcpo_megatron.memory.states import BYTES, model_elements, sharing_ranks, stage_chunks
from dcpo_megatron.training.checks import CheckedRun


@dataclass(frozen=True)
class Hardware:
    """A card and what is assumed of it: bytes, bytes/s, flop/s, seconds. The defaults are an H100 SXM with 80 GB."""

    name: str = "H100 80 GB"
    memory: float = 80e9
    peak: float = 989e12  # bf16, dense
    mfu: float = 0.40
    mfu_experts: float = 0.20
    bandwidth: float = 3.35e12
    bandwidth_share: float = 0.6  # of it while decoding, and in the optimizer
    decode_overhead: float = 5e-3  # of a server's decoding step: scheduling, sampling, launches
    embedded_overhead: float = 1.2e-3  # of a decoding step of transformers, a layer: launches from Python
    concurrency: int = 256  # requests that a server decodes together
    network: float = 50e9  # between nodes, a GPU
    nvlink: float = 450e9  # within a node
    node: int = 8


# Lengths are not known before: shares of the longest.
RESPONSE_SHARE, PROMPT_SHARE = 1 / 3, 1 / 8


@dataclass(frozen=True)
class StepEstimate:
    """Seconds by part, and the tokens a second and GPU that rollout was computed with on ``rollout_gpus`` GPUs,
    ``together`` responses on each.
    """

    seconds: dict[str, float]
    rate: float
    rollout_gpus: int
    together: int
    overlapped: bool

    @property
    def total(self) -> float:
        rollout = self.seconds["rollout"]
        rest = sum(self.seconds.values()) - rollout
        return max(rollout, rest) if self.overlapped else rollout + rest


def estimate_step(run: CheckedRun, server_gpus: int | None = None, card: Hardware | None = None) -> StepEstimate:
    """The estimate for ``run``. ``server_gpus``: GPUs of all servers; None: one each of ``servers.count`` or
    ``servers.urls``, or the ranks' own where colocated.
    """
    card = card or Hardware()
    config, shape, layout, world = run.config, run.shape, run.layout, run.world_size
    prompt, response = mean_lengths(run)
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    tokens = responses * (prompt + response)
    everything, met = model_elements(shape)
    forward = 2 * met + 2 * shape.layers * shape.heads * shape.head_dim * (prompt + response)
    flops = world * card.peak * (card.mfu_experts if shape.experts else card.mfu)
    updates = config.rollout.prompts_per_step // config.training.minibatch_prompts
    micro_batches = max(1.0, tokens / updates / layout.data_parallel(world) / config.training.micro_batch_tokens)
    bubble = 1 + (layout.pipeline - 1) / ((layout.virtual_pipeline or 1) * micro_batches)
    passes = 4 if config.model.recompute == "full" else 3
    before = (updates > 1 or config.rollout.max_mismatch is not None) + bool(run.objective.kl_coef)
    rollout, rate, gpus, together = _rollout(run, card, server_gpus, prompt, response)
    seconds = {
        "rollout": rollout,
        "old log-probs": tokens * forward / flops * bubble * before,
        "forward and backward": passes * tokens * forward / flops * bubble,
        "optimizer": updates * _update_seconds(run, card),
        "publish": (
            2 * BYTES[config.model.dtype] * everything / card.network + 2.0
            if config.rollout.engine == "sglang"
            else 0.0
        ),
    }
    return StepEstimate(seconds, rate, gpus, together, config.rollout.max_staleness > 0)


def mean_lengths(run: CheckedRun) -> tuple[int, int]:
    """Tokens of a prompt and of a response on average, as assumed."""
    return (
        max(1, round(run.config.data.max_prompt_tokens * PROMPT_SHARE)),
        max(1, round(run.config.rollout.max_response_tokens * RESPONSE_SHARE)),
    )


def _update_seconds(run: CheckedRun, card: Hardware) -> float:
    """Of the stage with most parameters. A data-parallel group within one node talks over NVLink."""
    layout, sharing = run.layout, sharing_ranks(run.shape, run.layout, run.world_size)
    worst = 0.0
    for stage in range(layout.pipeline):
        chunks = stage_chunks(run.shape, layout, stage)
        seconds = 0.0
        for held, ranks in zip(
            (sum(sum(c.dense) for c in chunks), sum(sum(c.expert) for c in chunks)), sharing, strict=True
        ):
            within = run.world_size // layout.pipeline <= card.node
            wire = 6 * held * (ranks - 1) / ranks / (card.nvlink if within else card.network)
            seconds += wire + (30 * held / ranks + 8 * held) / (card.bandwidth * card.bandwidth_share)
        worst = max(worst, seconds)
    return worst


def _rollout(run: CheckedRun, card: Hardware, server_gpus: int | None, prompt: int, response: int):
    """``(seconds, tokens/s a GPU, GPUs, responses together on a GPU)``."""
    config, servers = run.config, run.config.servers
    everything, met = model_elements(run.shape)
    weights, cache = BYTES[config.model.dtype] * everything, cache_token_bytes(run)
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    bandwidth = card.bandwidth * card.bandwidth_share

    def step(together: float, gpus: int, overhead: float) -> float:
        reads = (weights + together * (prompt + response / 2) * cache) / (bandwidth * gpus)
        return max(reads, together * 2 * met / (card.peak / 2 * gpus)) + overhead

    if config.rollout.engine == "embedded":
        # A batch lasts until its longest response ends, and every rank has a model of its own.
        gpus, batch = run.world_size, min(config.rollout.batch_size, -(-responses // run.world_size))
        batches = -(-responses // (gpus * batch))
        each = step(batch, 1, card.embedded_overhead * run.shape.layers)
        seconds = batches * config.rollout.max_response_tokens * each
        return seconds, responses * response / seconds / gpus, gpus, batch
    gpus = server_gpus or (run.world_size if config.publish.colocated else servers.count or len(servers.urls) or 1)
    # As many GPUs a server as its weights need to leave half of the memory to the cache.
    of_one = 1
    while weights > 0.5 * card.memory * of_one and of_one < gpus:
        of_one *= 2
    room = max(1.0, (0.85 * card.memory * of_one - weights) / (cache * (prompt + response)))
    together = max(1, int(min(card.concurrency, room, responses * of_one / gpus)))
    rate = together / step(together, of_one, card.decode_overhead) / of_one
    longest = config.rollout.max_response_tokens * step(1, of_one, card.decode_overhead)
    return max(responses * response / (gpus * rate), longest), rate, gpus, together


def estimate_text(run: CheckedRun, found: StepEstimate, card: Hardware | None = None) -> str:
    """The estimate and its assumptions as lines for a person."""
    card = card or Hardware()
    prompt, response = mean_lengths(run)
    mfu = card.mfu_experts if run.shape.experts else card.mfu
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in found.seconds.items())
    beside = " (rollout beside training)" if found.overlapped else ""
    return "\n".join(
        (
            (
                f"time of a step, an estimate for {card.name}, not measured: {parts}; together"
                f" {_seconds(found.total)}{beside}"
            ),
            (
                f"assumed: {card.peak / 1e12:.0f} TFLOP/s at {mfu:.0%}; {card.bandwidth / 1e12:.2f} TB/s at"
                f" {card.bandwidth_share:.0%}; {card.network / 1e9:.0f} GB/s a GPU between nodes,"
                f" {card.nvlink / 1e9:.0f} within; prompts of {prompt} and responses of {response} tokens on average;"
            ),
            f"rollout on {found.rollout_gpus} GPUs, {found.rate:,.0f} tokens/s each, {found.together} responses"
            " together" + ("" if run.config.rollout.engine == "embedded" else " on a server"),
        )
    )


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
