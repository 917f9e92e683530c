"""What the certificate runs: layouts, small models, data that hurts, objectives.

Everything is made from a seed; nothing here needs Megatron-Core.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.objectives import Objective, get_preset

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


@dataclass(frozen=True)
class Layout:
    """A parallel layout by name, on ``world`` ranks: the fields of ParallelLayout, packed or padded rows, and the model it runs."""

    name: str
    world: int
    parallel: dict = field(default_factory=dict)
    packed: bool = True
    model: str = "dense"
    micro_batches: int = 2

    @property
    def data_parallel(self) -> int:
        p = self.parallel
        return self.world // (p.get("tensor", 1) * p.get("pipeline", 1) * p.get("context", 1))


def _layout(name: str, packed: bool = True, model: str = "dense", micro_batches: int = 2) -> Layout:
    """Reads names such as ``tp2-sp-pp2-vpp2-cp2-dp2-ep2-etp1``; ``first1`` and ``last1`` are the layers of the first and the last stage."""
    sizes = {"tp": 1, "pp": 1, "cp": 1, "dp": 1}
    parallel: dict = {}
    for word in name.split("-"):
        if word == "sp":
            parallel["sequence_parallel"] = True
            continue
        key, size = word.rstrip("0123456789"), int(word.lstrip("abcdefghijklmnopqrstuvwxyz"))
        if key in sizes:
            sizes[key] = size
        full = {
            "tp": "tensor",
            "pp": "pipeline",
            "cp": "context",
            "vpp": "virtual_pipeline",
            "ep": "expert",
            "etp": "expert_tensor",
            "first": "first_stage_layers",
            "last": "last_stage_layers",
        }
        if (key in full and size > 1) or key in ("etp", "first", "last"):
            parallel[full[key]] = size
    world = sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"]
    label = (
        name
        + ("" if packed else "/padded")
        + (f"/{model}" if model != "dense" else "")
        + (f"/m{micro_batches}" if micro_batches != 2 else "")
    )
    return Layout(label, world, parallel, packed, model, micro_batches)


# Short names of models: the family, and what is changed in its small configuration.
KINDS: dict[str, tuple[str, dict]] = {
    "dense": ("qwen2", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "deep": ("qwen2", {"num_hidden_layers": 6}),
    "moe": ("qwen3_moe", {}),
}

LAYOUTS: list[Layout] = [
    _layout("dp1"),
    _layout("dp1", packed=False),
    _layout("dp1", micro_batches=1),
    _layout("dp1", packed=False, micro_batches=16),
    _layout("dp2"),
    _layout("dp2", packed=False),
    _layout("dp2", micro_batches=5),
    _layout("tp2"),
    _layout("tp2", packed=False),
    _layout("tp2-sp"),
    _layout("pp2"),
    _layout("pp2", packed=False, micro_batches=4),
    _layout("pp2-vpp2"),
    _layout("pp2-vpp2", packed=False, micro_batches=4),
    _layout("pp2-first1"),
    _layout("pp2-last1-dp2", packed=False, micro_batches=4),
    _layout("pp2-vpp2-first2", model="deep"),
    _layout("pp4-first1-last1", model="deep"),
    _layout("cp2"),
    _layout("cp2", packed=False),
    _layout("tp2-dp2"),
    _layout("pp2-dp2"),
    _layout("pp2-dp2", micro_batches=4),
    _layout("cp2-dp2"),
    _layout("cp2-dp2", micro_batches=4),
    _layout("tp2-sp", micro_batches=4),
    _layout("cp2-dp2", packed=False),
    _layout("tp2-pp2"),
    _layout("tp2-sp-pp2"),
    _layout("tp2-cp2"),
    _layout("tp2-sp-cp2"),
    _layout("pp2-cp2"),
    _layout("pp2-vpp2-cp2"),
    _layout("pp2-vpp2-cp2", micro_batches=4),
    _layout("pp2-vpp2-dp2"),
    _layout("tp2-sp-pp2-vpp2"),
    _layout("tp2-pp2-dp2"),
    _layout("tp2-sp-cp2-dp2"),
    _layout("pp2-cp2-dp2"),
    _layout("tp2-sp-pp2-cp2"),
    _layout("tp2-sp-pp2-vpp2-dp2"),
    _layout("dp1", model="tied"),
    _layout("tp2", model="tied"),
    _layout("pp2", model="tied"),
    _layout("tp2-sp-pp2-vpp2-dp2", model="tied"),
    _layout("tp2-sp-pp2-cp2", model="tied"),
    _layout("tp2", model="qwen3"),
    _layout("tp2-sp-cp2", model="qwen3"),
    _layout("tp2", model="llama"),
    _layout("pp2-vpp2-cp2", model="llama"),
    _layout("dp1", model="moe"),
    _layout("dp2-ep2", model="moe"),
    _layout("dp2-ep2-etp1", model="moe", packed=False),
    _layout("tp2-sp-dp2-ep2-etp1", model="moe"),
    _layout("tp2-sp-dp2-ep2-etp2", model="moe"),
    _layout("dp2-ep2", model="moe", micro_batches=4),
    _layout("pp2-dp2-ep2", model="moe"),
    _layout("cp2-dp2-ep2", model="moe"),
    _layout("tp2-sp-pp2-dp2-ep2-etp1", model="moe"),
]
# A family that no layout above runs is run by one that cuts every kind of parameter.
_RUN = {KINDS.get(layout.model, (layout.model,))[0] for layout in LAYOUTS}
LAYOUTS += [_layout("tp2-sp-pp2", model=model_type) for model_type in FAMILIES if model_type not in _RUN]

FAST = (
    "dp2",
    "dp1/padded",
    "tp2-sp",
    "pp2-vpp2",
    "pp2-first1",
    "pp2-vpp2-first2/deep",
    "cp2",
    "cp2/padded",
    "tp2-sp-cp2",
    "dp2-ep2/moe",
    "pp2/tied",
    "tp2/qwen3",
    "tp2/llama",
)


def find_layouts(names: str) -> list[Layout]:
    """``all``, ``fast``, or names separated by commas. Raises ValueError for an unknown one, listing the known."""
    known = {layout.name: layout for layout in LAYOUTS}
    if names == "all":
        return LAYOUTS
    if names == "fast":
        return [known[name] for name in FAST]
    found = []
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"unknown layout {name!r}; the known ones are: fast, all, {', '.join(known)}")
        found.append(known[name])
    return found


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

# Response lengths of 4 prompts x 4 responses: 1 to 40 tokens, and one prompt whose advantages are all 0.
LENGTHS = ((1, 40, 2, 7), (3, 3, 21, 5), (13, 2, 6, 30), (4, 9, 2, 17))
PROMPT_LENGTHS = (3, 11, 6, 1)
ZERO_PROMPT = 2
VOCAB = 101  # odd: needs padding for any tensor size


def make_items(seed: int = 0) -> list[Item]:
    """The minibatch. Old log-probs are filled in by :func:`attach_old_logprobs`, near the model's own, so that every clip branch is met."""
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


def attach_old_logprobs(items: list[Item], logprobs: list[torch.Tensor], seed: int = 1) -> None:
    """Old, rollout and reference log-probs: the current ones plus noise wide enough to cross bounds and caps."""
    generator = torch.Generator().manual_seed(seed)
    for item, current in zip(items, logprobs):
        noise = torch.randn(len(item.response), generator=generator) * 0.5
        # A fifth of the tokens jump far, so that the cap is met too.
        far = torch.rand(len(item.response), generator=generator) < 0.2
        item.old_logprobs = (current - torch.where(far, noise * 6, noise)).clamp(max=-1e-3)
        item.rollout_logprobs = (item.old_logprobs + 0.2 * torch.randn(len(item.response), generator=generator)).clamp(
            max=-1e-3
        )
        item.reference_logprobs = (current + 0.3 * torch.randn(len(item.response), generator=generator)).clamp(
            max=-1e-3
        )


def make_model(kind: str, folder: str, seed: int = 0, **changes) -> None:
    """Writes a small Hugging Face model: a kind of ``KINDS`` or any family by its model_type, ``changes`` made to its configuration, and weights large enough
    that attention and router are far from uniform.

    Raises:
        ValueError: an unknown kind, listing the known ones.
    """
    from transformers import AutoModelForCausalLM

    model_type, own = KINDS.get(kind, (kind, {}))
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model {kind!r}: use {', '.join(KINDS)} or a family: {', '.join(FAMILIES)}")
    torch.manual_seed(seed)
    config = FAMILIES[model_type].tiny_config(**dict(vocab_size=VOCAB) | own | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
