"""What a run with Transformer Engine writes otherwise than a run without, and how each reads the other's checkpoint.

                      with                                           without
    second norm, MoE  decoder.layers.pre_mlp_layernorm.weight        decoder.layers.mlp.linear_fc1.layer_norm_weight
    empty states      linear layers and norms (``._extra_state``)    linear layers
    Adam's step       in a group's settings, an int, from step 1 on  in a parameter's state, a tensor; a float where it
                                                                     is saved
    Adam's settings   bias_correction                                amsgrad, foreach, ...

All numbers are the same: weights, moments and main weights have the same shapes in both, so nothing is computed here.
"""

from __future__ import annotations

import os

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from dcpo_megatron.mcore.families.base import FUSED_NORMS

_NAMES = [pair for fused, plain in FUSED_NORMS.items() for pair in ((fused, plain), (plain, fused))]


def ask_as_saved(request: dict, folder: str | os.PathLike) -> dict:
    """Asks for what the checkpoint in ``folder`` has: a norm under the name that it was saved under, and no empty state
    that it lacks.

    ``request`` is a sharded state dict for loading, its factories applied or not; it is changed in place and given
    back.
    """
    saved = load_sharded_metadata(str(folder)).keys()

    def ask(value):
        if isinstance(value, ShardedTensor) and value.key not in saved:
            others = (value.key.replace(name, other) for name, other in _NAMES if value.key.endswith(name))
            value.key = next((key for key in others if key in saved), value.key)
        elif isinstance(value, ShardedObject) and value.key.endswith("._extra_state") and value.unique_key not in saved:
            return LocalNonpersistentObject(None)
        return value

    return dict_list_map_inplace(ask, request)


def settings_of_any_adam(settings: dict) -> dict:
    """A distributed optimizer's saved settings so that each kind of Adam takes them: the step an int in every group.
    Changed in place and given back.
    """
    for group in settings["optimizer"]["param_groups"]:
        group["step"] = int(group.get("step") or 0)
    return settings


# What of a group follows from the model; the rest is configured, or counted.
_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def configure_anew(settings: dict, groups: list[dict]) -> None:
    """Gives an optimizer's saved ``settings`` the numbers (learning rate, decay, betas, ...) of the ``groups`` that
    this run has made; changed in place. What is counted stays as it was saved.

    Without it a changed number would be without effect, or, from Megatron-Core 0.19 on, which tells groups apart by
    their learning rates, a KeyError.
    """

    def kind(group: dict) -> tuple:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in _KIND)

    present = {kind(group): group for group in groups}
    for group in settings.get("optimizer", settings)["param_groups"]:
        now = present.get(kind(group), {})
        group |= {name: value for name, value in now.items() if name not in ("params", "step")}
