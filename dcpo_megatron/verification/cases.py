"""What the certificate runs on: small models, data that hurts, objectives. The layouts are in
:mod:`~dcpo_megatron.verification.layouts`.

Everything is made from a seed; nothing here needs Megatron-Core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.objectives import PRESETS, Objective, get_preset

TEMPERATURE = 0.8


@dataclass
class Item:
    """One response of the minibatch: token ids, the numbers its loss needs, and the prompt it belongs to."""

    prompt_id: int
    prompt: list[int]
    response: list[int]
    advantage: float
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor


# Short names of models: the family, and what is changed in its small configuration.
KINDS: dict[str, tuple[str, dict]] = {
    "dense": ("qwen2", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "deep": ("qwen2", {"num_hidden_layers": 6}),
    "moe": ("qwen3_moe", {}),
}


def tiny_config(kind: str, **changes):
    """The transformers configuration of a kind of :data:`KINDS` or of any family by its model_type.

    Raises:
        ValueError: an unknown kind, listing the known ones.
    """
    model_type, own = KINDS.get(kind, (kind, {}))
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model {kind!r}: use {', '.join(KINDS)} or a family: {', '.join(FAMILIES)}")
    return FAMILIES[model_type].tiny_config(**dict(vocab_size=VOCAB) | own | changes)


# The named ones; gspo's own bounds are so narrow that every token would be clipped.
OBJECTIVES: dict[str, Objective] = {
    "dcpo-paper": get_preset("dcpo-paper"),
    "dcpo-official-code": get_preset("dcpo-official-code"),
    "grpo+kl": dataclasses.replace(get_preset("grpo"), kl_coef=0.1),
    "dapo": get_preset("dapo"),
    "gspo": dataclasses.replace(get_preset("gspo"), eps_low=0.1, eps_high=0.2),
    "dcpo+entropy": dataclasses.replace(get_preset("dcpo-paper"), entropy_coef=0.05),
    "dcpo+tis": dataclasses.replace(get_preset("dcpo-paper"), correction="tis", correction_cap=1.2),
    "grpo+icepop": dataclasses.replace(
        get_preset("grpo"), correction="icepop", correction_low=0.8, correction_high=1.3
    ),
}

# What may be added to any preset's name: ``gspo+entropy``.
SWITCHES: dict[str, dict] = {
    "kl": {"kl_coef": 0.1},
    "kl-cap": {"kl_coef": 0.1, "kl_cap": 0.01},
    "entropy": {"entropy_coef": 0.05},
    "tis": {"correction": "tis", "correction_cap": 1.2},
    "mis": {"correction": "mis", "correction_cap": 1.2},
    "icepop": {"correction": "icepop", "correction_low": 0.8, "correction_high": 1.3},
}


def find_objectives(names: str) -> dict[str, Objective]:
    """``all`` of :data:`OBJECTIVES`, or names separated by commas: one of those, or any preset with any of
    :data:`SWITCHES` added.

    Raises:
        ValueError: an unknown name or switch, listing the known ones.
    """
    if names == "all":
        return dict(OBJECTIVES)
    found = {}
    for name in map(str.strip, names.split(",")):
        preset, *switches = name.split("+")
        if name not in OBJECTIVES and (preset not in PRESETS or not SWITCHES.keys() >= set(switches)):
            raise ValueError(
                f"unknown objective {name!r}; the known ones are: all, {', '.join(OBJECTIVES)}, and the presets "
                f"{', '.join(PRESETS)} with any of +{', +'.join(SWITCHES)}"
            )
        changes = {field: value for switch in switches for field, value in SWITCHES.get(switch, {}).items()}
        base = OBJECTIVES.get(preset) or PRESETS.get(preset)
        found[name] = OBJECTIVES.get(name) or dataclasses.replace(base, **changes)
    return found


# Response lengths of 4 prompts x 4 responses: 1 to 40 tokens, and one prompt whose advantages are all 0.
LENGTHS = ((1, 40, 2, 7), (3, 3, 21, 5), (13, 2, 6, 30), (4, 9, 2, 17))
PROMPT_LENGTHS = (3, 11, 6, 1)
ZERO_PROMPT = 2
VOCAB = 101  # odd: needs padding for any tensor size


def make_items(seed: int = 0) -> list[Item]:
    """The minibatch. Old log-probs are filled in by :func:`attach_old_logprobs`, near the model's own, so that every
    clip branch is met."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for prompt_id, (lengths, prompt_length) in enumerate(zip(LENGTHS, PROMPT_LENGTHS)):
        prompt = torch.randint(0, VOCAB, (prompt_length,), generator=generator).tolist()
        for length in lengths:
            response = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
            advantage = (
                0.0 if prompt_id == ZERO_PROMPT else float(torch.randn((), generator=generator, dtype=torch.float64))
            )
            blank = torch.zeros(length)
            items.append(Item(prompt_id, prompt, response, advantage, blank, blank.clone(), blank.clone()))
    return items


VISITS = 3


def visit_rewards(items: list[Item], visit: int) -> tuple[list[str], list[float]]:
    """Prompt ids and shaped rewards of one visit of the items' prompts, in the items' order."""
    generator = torch.Generator().manual_seed(1000 + visit)
    return [f"prompt-{item.prompt_id}" for item in items], torch.randn(
        len(items), generator=generator, dtype=torch.float64
    ).tolist()


def attach_old_logprobs(
    items: list[Item],
    logprobs: list[torch.Tensor],
    seed: int = 1,
    refused: Callable[[torch.Tensor, Item], torch.Tensor] | None = None,
) -> None:
    """Old, rollout and reference log-probs: the current ones plus noise wide enough to cross bounds and caps.

    ``refused(current, item)`` says which tokens' old log-probs are drawn again, until there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    for item, current in zip(items, logprobs):
        again = torch.ones(len(item.response), dtype=torch.bool)
        while again.any():
            noise = torch.randn(len(item.response), generator=generator) * 0.5
            # A fifth of the tokens jump far, so that the cap is met too.
            far = torch.rand(len(item.response), generator=generator) < 0.2
            drawn = (current - torch.where(far, noise * 6, noise)).clamp(max=-1e-3)
            item.old_logprobs = torch.where(again, drawn, item.old_logprobs)
            again = torch.zeros_like(again) if refused is None else refused(current, item)
        item.rollout_logprobs = (item.old_logprobs + 0.2 * torch.randn(len(item.response), generator=generator)).clamp(
            max=-1e-3
        )
        item.reference_logprobs = (current + 0.3 * torch.randn(len(item.response), generator=generator)).clamp(
            max=-1e-3
        )


def make_model(kind: str, folder: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> None:
    """Writes a small Hugging Face model of :func:`tiny_config`, with weights large enough that attention and router are
    far from uniform.

    Weights are numbers that ``dtype`` holds, written as fp32.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
            parameter.copy_(parameter.to(dtype))
    model.save_pretrained(folder)
