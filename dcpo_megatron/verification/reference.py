"""What one process computes, from nothing but the Hugging Face model, plain autograd and the formulas written out.

No Megatron-Core, no ``dcpo_megatron.objectives``, no weights computed ahead: each response goes through the model
alone, each token's loss is the maximum or minimum that its paper states, and the minibatch loss is the mean that the
aggregation's name says. Slow on purpose; it shares no line with what it checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dcpo_megatron.verification.cases import Item


@dataclass
class Reference:
    """Dense results: ``gradients`` by Hugging Face name, log-probs and entropies by item. ``magnitude``: the loss with
    the absolute value of every token's."""

    loss: float
    magnitude: float
    gradients: dict[str, torch.Tensor]
    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor]


def load_model(folder: str, dtype: torch.dtype = torch.float32):
    """The Hugging Face model, in training mode without dropout (these families have none)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def token_distribution(model, item: Item, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of each response token, ``[len(response)]`` each, with gradient."""
    ids = torch.tensor([[*item.prompt, *item.response]])
    logits = model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1].float() / temperature
    logp = torch.log_softmax(logits, dim=-1)
    chosen = logp.gather(1, torch.tensor(item.response)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def token_losses(logp, entropy, item: Item, settings: dict) -> torch.Tensor:
    """The loss of each token of one response, by the formulas (DCPO, GRPO, DAPO, GSPO papers)."""
    old = item.old_logprobs
    advantage = item.advantage
    ratio = torch.exp(logp - old)
    if settings["ratio_level"] == "sequence":
        # s = exp(mean_t log r), one number a response.
        ratio = torch.exp((logp - old).mean()).expand_as(logp)
    if settings["bounds"] == "dac":
        q = old.double().exp()
        lower = 0.5 + 0.5 * torch.sqrt(torch.clamp(1 - 4 * settings["eps_low"] / q, min=0))
        upper = torch.clamp(0.5 + 0.5 * torch.sqrt(1 + 4 * settings["eps_high"] / q), max=settings["ratio_max"])
        lower, upper = lower.float(), upper.float()
    else:
        lower = torch.full_like(old, 1 - settings["eps_low"])
        upper = torch.full_like(old, 1 + settings["eps_high"])
    if advantage > 0:
        loss = -advantage * torch.minimum(ratio, upper)
    elif advantage < 0:
        loss = -advantage * torch.maximum(ratio, lower)
        if settings["cap_negative"] is not None:
            loss = torch.minimum(loss, torch.full_like(loss, -advantage * settings["cap_negative"]))
    else:
        loss = 0.0 * ratio
    if settings["correction"] == "tis":
        loss = loss * torch.clamp(torch.exp(old - item.rollout_logprobs), max=settings["correction_cap"])
    elif settings["correction"] == "mis":
        weight = torch.exp(old - item.rollout_logprobs)
        loss = loss * torch.where(weight <= settings["correction_cap"], weight, torch.zeros_like(weight))
    elif settings["correction"] == "icepop":
        weight = torch.exp(old - item.rollout_logprobs)
        inside = (weight >= settings["correction_low"]) & (weight <= settings["correction_high"])
        loss = loss * torch.where(inside, weight, torch.zeros_like(weight))
    if settings["kl_coef"]:
        gap = item.reference_logprobs - logp
        k3 = torch.exp(gap) - gap - 1
        if settings["kl_cap"] is not None:
            k3 = torch.minimum(k3, torch.full_like(k3, settings["kl_cap"]))
        loss = loss + settings["kl_coef"] * k3
    return loss - settings["entropy_coef"] * entropy


def aggregate(losses: list[torch.Tensor], items: list[Item], settings: dict) -> torch.Tensor:
    """One number from the token losses of a whole minibatch, as the aggregation's name says (spec of OTM, GRPO, DAPO,
    Dr.GRPO)."""
    prompts = sorted({item.prompt_id for item in items})
    if settings["aggregation"] == "otm":
        per_prompt = [sum(loss.mean() for loss, item in zip(losses, items) if item.prompt_id == p) for p in prompts]
        return sum(per_prompt) / len(prompts)
    if settings["aggregation"] == "slm":
        groups = [[loss.mean() for loss, item in zip(losses, items) if item.prompt_id == p] for p in prompts]
        return sum(sum(group) / len(group) for group in groups) / len(prompts)
    if settings["aggregation"] == "tlm":
        return torch.cat(losses).mean()
    return torch.cat(losses).sum() / (len(items) * settings["max_response_tokens"])


def dense_reference(model, items: list[Item], settings: dict, temperature: float) -> Reference:
    """Loss and gradients of the minibatch ``items`` under ``settings`` (the fields of an objective, as a dict)."""
    tokens = [token_distribution(model, item, temperature) for item in items]
    losses = [token_losses(logp, entropy, item, settings) for (logp, entropy), item in zip(tokens, items)]
    loss = aggregate(losses, items, settings)
    # One response after the other, added up in fp32: a sum over responses in bfloat16 would cost more than all the
    # rest.
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for token_loss, share in zip(losses, torch.autograd.grad(loss, losses, retain_graph=True)):
        model.zero_grad(set_to_none=True)
        token_loss.backward(share)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad
    return Reference(
        loss=float(loss.detach()),
        magnitude=float(aggregate([token_loss.detach().abs() for token_loss in losses], items, settings)),
        gradients=gradients,
        logprobs=[logp.detach() for logp, _ in tokens],
        entropies=[entropy.detach() for _, entropy in tokens],
    )


def near_a_jump(logp: torch.Tensor, item: Item, objectives: list[dict], margin: float) -> torch.Tensor:
    """Which tokens of a response lie so near a bound that ``margin`` nats, up or down, switch their gradient on or off.
    ``[len(response)]`` bool.

    No rounding error bounds the gradient there: a token is clipped in one process and not in the other.
    """
    near = torch.zeros(len(item.response), dtype=torch.bool)
    for settings in objectives:
        ratio_alone = settings | {"correction": "none", "kl_coef": 0.0, "entropy_coef": 0.0}
        trained = []
        for shift in (-margin, 0.0, margin):
            moved = (logp.detach() + shift).requires_grad_()
            (slope,) = torch.autograd.grad(token_losses(moved, 0.0, item, ratio_alone).sum(), moved)
            trained.append(slope != 0)
        near |= (trained[0] != trained[1]) | (trained[1] != trained[2])
    return near


def sgd_step(start: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], lr: float) -> dict[str, torch.Tensor]:
    """Parameters after ``p - lr g``."""
    return {name: parameter - lr * gradients[name] for name, parameter in start.items()}


def adamw_steps(start: dict, gradients: list[dict], lr: float, settings: dict) -> dict[str, torch.Tensor]:
    """Parameters after one AdamW step a gradient, each clipped to ``clip_grad`` first, in double precision (arXiv
    1711.05101).

    Weight decay leaves out vectors (norms, biases), as Megatron-Core does.
    """
    beta1, beta2 = settings["betas"]
    clip = settings["clip_grad"]
    p = {name: tensor.double() for name, tensor in start.items()}
    m = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    v = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    for step, gradient in enumerate(gradients, start=1):
        scale = min(1.0, clip / (gradient_norm(gradient) + 1e-6))
        for name, tensor in p.items():
            g = gradient[name].double() * scale
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            decay = settings["weight_decay"] if tensor.dim() > 1 else 0.0
            update = (m[name] / (1 - beta1**step)) / ((v[name] / (1 - beta2**step)).sqrt() + settings["eps"])
            p[name] = tensor - lr * decay * tensor - lr * update
    return p


def gradient_norm(gradients: dict[str, torch.Tensor]) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
