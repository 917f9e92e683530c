"""The layouts that the certificate runs, and what their names mean.

    tp2-sp-pp2-vpp2-cp2-dp2-ep2-etp1 / padded / moe / m4
    sizes of each dimension            rows    model  micro-batches
    (packed rows, the dense model and two micro-batches where nothing is said)

A name that is not in the list is as good as one that is: :func:`parse_layout` reads it, and refuses what the model
cannot have before a rank is started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.hf_config import shape_of
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.verification.cases import KINDS, tiny_config


@dataclass(frozen=True)
class Layout:
    """A parallel layout by name, on ``world`` ranks: the fields of ParallelLayout, packed or padded rows, and the model
    it runs."""

    name: str
    world: int
    parallel: dict = field(default_factory=dict)
    packed: bool = True
    model: str = "dense"
    micro_batches: int = 2


NAMES = [
    "dp1",
    "dp1/padded",
    "dp1/m1",
    "dp1/padded/m16",
    "dp2",
    "dp2/padded",
    "dp2/m5",
    "tp2",
    "tp2/padded",
    "tp2-sp",
    "pp2",
    "pp2/padded/m4",
    "pp2-vpp2",
    "pp2-vpp2/padded/m4",
    "pp2-first1",
    "pp2-last1-dp2/padded/m4",
    "pp2-vpp2-first2/deep",
    "pp4-first1-last1/deep",
    "cp2",
    "cp2/padded",
    "tp2-dp2",
    "pp2-dp2",
    "pp2-dp2/m4",
    "cp2-dp2",
    "cp2-dp2/m4",
    "tp2-sp/m4",
    "cp2-dp2/padded",
    "tp2-pp2",
    "tp2-sp-pp2",
    "tp2-cp2",
    "tp2-sp-cp2",
    "pp2-cp2",
    "pp2-vpp2-cp2",
    "pp2-vpp2-cp2/m4",
    "pp2-vpp2-dp2",
    "tp2-sp-pp2-vpp2",
    "tp2-pp2-dp2",
    "tp2-sp-cp2-dp2",
    "pp2-cp2-dp2",
    "tp2-sp-pp2-cp2",
    "tp2-sp-pp2-vpp2-dp2",
    "tp2-sp-dp2",
    "tp2-cp2-dp2",
    "tp2-pp2-cp2",
    "tp2-pp2-vpp2",
    "tp2-pp2-vpp2-cp2",
    "tp2-pp2-vpp2-dp2",
    "tp2-sp-pp2-dp2",
    "tp2-sp-pp2-vpp2-cp2",
    "pp2-vpp2-cp2-dp2",
    "dp1/tied",
    "tp2/tied",
    "pp2/tied",
    "tp2-sp-pp2-vpp2-dp2/tied",
    "tp2-sp-pp2-cp2/tied",
    "tp2/qwen3",
    "tp2-sp-cp2/qwen3",
    "tp2/llama",
    "pp2-vpp2-cp2/llama",
    "dp1/moe",
    "dp2-ep2/moe",
    "dp2-ep2-etp1/padded/moe",
    "tp2-sp-dp2-ep2-etp1/moe",
    "tp2-sp-dp2-ep2-etp2/moe",
    "dp2-ep2/moe/m4",
    "pp2-dp2-ep2/moe",
    "cp2-dp2-ep2/moe",
    "tp2-sp-pp2-dp2-ep2-etp1/moe",
    "cp2-ep2/moe",
    "tp2-sp-ep2-etp1/moe",
    "tp2-sp-cp2-ep2-etp1/moe",
    "pp2-vpp2-dp2-ep2/moe",
]
# A family that no layout above runs is run by one that cuts every kind of parameter.
_RUN = {KINDS.get(word, (word,))[0] for name in [*NAMES, "dp1/dense"] for word in name.split("/")[1:]}
NAMES += [f"tp2-sp-pp2/{model_type}" for model_type in FAMILIES if model_type not in _RUN]

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
    """``all``, ``fast``, or names separated by commas (any that :func:`parse_layout` takes), each once.

    Raises:
        ValueError: a name that cannot be read, or a layout that its model cannot have.
    """
    chosen = {"all": NAMES, "fast": FAST}.get(names) or [name.strip() for name in names.split(",")]
    return [parse_layout(name) for name in dict.fromkeys(chosen)]


_WORDS = {
    "tp": "tensor",
    "pp": "pipeline",
    "cp": "context",
    "dp": "data",
    "vpp": "virtual_pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
    "first": "first_stage_layers",
    "last": "last_stage_layers",
}


def parse_layout(name: str) -> Layout:
    """Reads ``tp2-sp-pp2-vpp2-cp2-dp2-ep2-etp1``, with ``first1`` and ``last1`` for the layers of the outer stages,
    then any of ``/padded``, ``/MODEL``, ``/m5``.

    Raises:
        ValueError: a word that means nothing, or a layout that the model cannot have; says why.
    """
    sizes, *rest = name.split("/")
    parallel: dict = {}
    for word in sizes.split("-"):
        match = re.fullmatch(r"([a-z]+)([1-9]\d*)", word)
        if word == "sp":
            parallel["sequence_parallel"] = True
        elif match and match[1] in _WORDS and _WORDS[match[1]] not in parallel:
            parallel[_WORDS[match[1]]] = int(match[2])
        else:
            raise ValueError(
                f"layout {name!r}: {word!r} says nothing: write sizes like"
                " tp2-sp-pp2-vpp2-cp2-dp2-ep2-etp1-first1-last1, each once"
            )
    data = parallel.pop("data", 1)
    packed, model, micro_batches = True, "dense", 2
    for word in rest:
        if word in ("packed", "padded"):
            packed = word == "packed"
        elif re.fullmatch(r"m[1-9]\d*", word):
            micro_batches = int(word[1:])
        elif word in KINDS or word in FAMILIES:
            model = word
        else:
            raise ValueError(
                f"layout {name!r}: /{word} is none of /padded, /m5 (micro-batches), or a model:"
                f" {', '.join({**KINDS, **FAMILIES})}"
            )
    layout = ParallelLayout(**parallel)
    world = layout.model_ranks * data
    problems = layout.problems(shape_of(tiny_config(model)), world)
    if layout.interleaved and micro_batches % layout.pipeline:
        problems.append(
            f"{micro_batches} micro-batches are not a multiple of the {layout.pipeline} pipeline stages, which an"
            " interleaved schedule needs"
        )
    if problems:
        raise ValueError(f"layout {name!r}: {'; '.join(problems)}")
    return Layout(name, world, parallel, packed, model, micro_batches)
