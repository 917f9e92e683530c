"""The DCPO loss as Megatron-Core's schedule wants it: a function that a forward step returns.

    from dcpo_megatron.mcore import make_loss, response_head, unwrap

    def forward_step(data_iterator, model):
        batch = next(data_iterator)                                # a MicroBatch, see make_micro_batch
        with response_head(unwrap(model), batch.positions, batch.targets, vocab=V) as extra:
            output = model(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.packed, **extra)
        if not unwrap(model).post_process:
            return output, None                                    # an earlier pipeline stage
        return output, make_loss(batch, "dcpo-paper", num_microbatches=M, data_parallel_size=DP)

**One normaliser.** Every response token has a weight w_t computed on the host from the whole minibatch
(``aggregation_weights``). In default mode the schedule multiplies by cp / num_microbatches and DistributedDataParallel
averages over dp * cp, so the function returns

    (sum over local tokens of w_t l_t) * num_microbatches * dp
    l_t = c_t * policy_t + kl_coef * k3_t - entropy_coef * H_t

and the gradient becomes the sum over all ranks of w_t dl_t. ``dp`` is the pure data-parallel size, ``num_microbatches``
the number really given to the schedule. The function returns a 2-tuple, so ``calculate_per_token_loss`` must stay False
(with it nothing would divide the gradient).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dcpo_megatron.mcore.batch import MicroBatch
from dcpo_megatron.objectives import (
    Objective,
    PolicyLoss,
    get_preset,
    kl_k3,
    policy_loss,
    rollout_correction,
    vacuous_upper_bound,
)

# Sums over response tokens, in the order of the metrics tensor; every ratio below has one of the last rows as its
# declared denominator.
SUM_NAMES = (
    "loss",  # sum of w_t l_t: the minibatch loss itself
    "policy_loss",  # sum of w_t c_t policy_t
    "kl_loss",  # sum of w_t kl_coef k3_t
    "entropy_loss",  # sum of -w_t entropy_coef H_t
    "clipped_upper",
    "clipped_lower",
    "clipped_cap",
    "gradient_removed",
    "entropy",
    "ratio",
    "vacuous_upper",
    "bound_lower",
    "bound_upper",
    "reference_kl",
    "mismatch_abs",
    "mismatch_k3",
    "mismatch_weight",
    "mismatch_weight_squared",
    "mismatch_tokens",
    "tokens",
)
MAX_NAMES = ("mismatch_abs_max", "ratio_deviation_max")


def can_fuse(objective: Objective) -> bool:
    """Whether a token's gradient is known once its own log-prob and entropy are: every objective but those with one
    ratio for the whole response."""
    return objective.ratio_level == "token"


def make_loss(
    batch: MicroBatch,
    objective: Objective | str,
    *,
    num_microbatches: int,
    data_parallel_size: int,
    context_group: dist.ProcessGroup | None = None,
    fused: bool = False,
    own_old_logprobs: bool = False,
) -> MicroBatchLoss:
    """The loss function of one micro-batch; see the module's text for the contract.

    Args:
        batch: with ``old_logprobs`` (or None with ``own_old_logprobs``); ``reference_logprobs`` where ``kl_coef`` is
            not 0, ``rollout_logprobs`` where a correction is on.
        objective: an :class:`Objective` or a preset's name.
        context_group: the context-parallel group; only a sequence-level ratio needs it.
        fused: the function is also given to ``response_head(fused_loss=...)``, which forms the gradients with it in the
            forward pass.
        own_old_logprobs: where the batch has no ``old_logprobs``, this very forward pass gives them. Right for the only
            update of a rollout batch: its ratios are then exactly 1.

    Returns:
        ``f(output) -> (scaled loss, {"sums": [len(SUM_NAMES)] float64, "maxima": [len(MAX_NAMES)] float64})``, with
        ``output`` what ``response_head`` gave: ``[n, 2]``, or ``[n + 1, 2]`` fused. The metrics are local and unscaled,
        so their sum over micro-batches, data- and context-parallel ranks is the minibatch's; they are the same fused or
        not.

    Raises:
        ValueError: log-probs that the objective needs are missing, or it cannot be fused.
    """
    objective = get_preset(objective) if isinstance(objective, str) else objective
    if batch.old_logprobs is None and not own_old_logprobs:
        raise ValueError(
            "the micro-batch has no old_logprobs: compute them before the first update of the rollout batch; for its"
            " only update own_old_logprobs=True takes those of the update's own forward pass"
        )
    if objective.kl_coef and batch.reference_logprobs is None:
        raise ValueError(
            f"kl_coef={objective.kl_coef} needs reference_logprobs: compute them with the reference model's weights"
        )
    if fused and not can_fuse(objective):
        raise ValueError(
            f"ratio_level={objective.ratio_level!r} cannot be fused into the head: the ratio of a response is known"
            " only after its last token; make the loss with fused=False"
        )
    return MicroBatchLoss(batch, objective, num_microbatches * data_parallel_size, context_group, fused)


@dataclass(frozen=True, eq=False)
class MicroBatchLoss:
    """The loss of one micro-batch: a function of what the head gave, made by :func:`make_loss`. ``scale`` is
    num_microbatches * dp."""

    batch: MicroBatch
    objective: Objective
    scale: int
    context_group: dist.ProcessGroup | None
    fused: bool

    def __call__(self, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.fused:
            loss, values = output[-1, 0], output[:-1].detach()
            with torch.no_grad():
                terms = self._terms(values[:, 0], values[:, 1])
        else:
            values = output
            terms = self._terms(values[:, 0], values[:, 1])
            loss = terms.loss
        return loss * self.scale, _metrics(self.batch, self.objective, terms, values[:, 1])

    def token_loss(self, logprobs: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        """The unscaled loss of the tokens ``part`` of this micro-batch, from their log-probs and entropies ``[c]``;
        carries the gradient."""
        return self._terms(logprobs, entropy, part).loss

    def _terms(self, logprobs: torch.Tensor, entropy: torch.Tensor, part: slice = slice(None)) -> _Terms:
        batch, objective = self.batch, self.objective
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[part]
        rollout_logprobs = None if batch.rollout_logprobs is None else batch.rollout_logprobs[part]
        sequence_level = objective.ratio_level == "sequence"
        clipped = policy_loss(
            logprobs,
            old_logprobs,
            batch.advantages[part],
            objective,
            response_ids=batch.response if sequence_level else None,
            response_lengths=batch.response_lengths if sequence_level else None,
            all_reduce=self._reduce_context if sequence_level else None,
        )
        policy = clipped.loss * rollout_correction(old_logprobs, rollout_logprobs, objective)
        per_token = policy
        reference_kl = None
        if batch.reference_logprobs is not None:
            reference_kl = kl_k3(logprobs, batch.reference_logprobs[part], objective.kl_cap)
            per_token = per_token + objective.kl_coef * reference_kl
        if objective.entropy_coef:
            per_token = per_token - objective.entropy_coef * entropy
        return _Terms((batch.weights[part] * per_token).sum(), clipped, policy, reference_kl, old_logprobs)

    def _reduce_context(self, sums: torch.Tensor) -> torch.Tensor:
        if self.context_group is not None and dist.get_world_size(self.context_group) > 1:
            dist.all_reduce(sums, group=self.context_group)
        return sums


@dataclass(frozen=True, eq=False)
class _Terms:
    """``loss``: sum of w_t l_t. ``policy``: c_t policy_t of every token."""

    loss: torch.Tensor
    clipped: PolicyLoss
    policy: torch.Tensor
    reference_kl: torch.Tensor | None
    old_logprobs: torch.Tensor


@torch.no_grad()
def _metrics(batch: MicroBatch, objective: Objective, parts: _Terms, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    terms, loss, policy, reference_kl = parts.clipped, parts.loss, parts.policy, parts.reference_kl
    old_logprobs = parts.old_logprobs

    def total(values) -> torch.Tensor:
        return values.detach().double().sum()

    zero = torch.zeros((), dtype=torch.float64, device=loss.device)
    count = zero + batch.targets.numel()
    sums = dict.fromkeys(SUM_NAMES, zero)
    sums |= {
        "loss": loss.detach().double(),
        "policy_loss": total(batch.weights * policy),
        "entropy_loss": -objective.entropy_coef * total(batch.weights * entropy),
        "clipped_upper": total(terms.clipped_upper),
        "clipped_lower": total(terms.clipped_lower),
        "clipped_cap": total(terms.clipped_cap),
        "gradient_removed": total(terms.gradient_removed),
        "entropy": total(entropy),
        "ratio": total(terms.ratio),
        "vacuous_upper": total(vacuous_upper_bound(old_logprobs, objective.eps_high)),
        "bound_lower": total(terms.lower),
        "bound_upper": total(terms.upper.clamp(max=1e6)),
        "tokens": count,
    }
    if reference_kl is not None:
        sums["reference_kl"] = total(reference_kl)
        sums["kl_loss"] = objective.kl_coef * total(batch.weights * reference_kl)
    maxima = [zero, (terms.ratio - 1).abs().double().max() if batch.targets.numel() else zero]
    if batch.rollout_logprobs is not None:
        # k3 with samples of the rollout engine: log w = log p_train - log p_rollout, k3 = w - 1 - log w >= 0.
        difference = old_logprobs.double() - batch.rollout_logprobs.double()
        weight = difference.clamp(-20, 20).exp()
        sums |= {
            "mismatch_abs": total(difference.abs()),
            "mismatch_k3": total(torch.expm1(difference.clamp(-20, 20)) - difference.clamp(-20, 20)),
            "mismatch_weight": total(weight),
            "mismatch_weight_squared": total(weight**2),
            "mismatch_tokens": count,
        }
        if difference.numel():
            maxima[0] = difference.abs().max()
    return {"sums": torch.stack([sums[name] for name in SUM_NAMES]), "maxima": torch.stack(maxima)}
