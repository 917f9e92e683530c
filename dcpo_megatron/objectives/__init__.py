"""The objective of policy optimisation as pure functions of tensors: no process groups, no I/O, no trainer.

    loss = sum over tokens of  weight * (correction * policy_loss + kl_coef * kl_k3 - entropy_coef * entropy)

`Objective` says which variant; everything else reads it.
"""

from .aggregation import aggregation_weights
from .bounds import (
    dynamic_clip_bounds,
    fixed_clip_bounds,
    no_clip_bounds,
    ripo_clip_bounds,
    vacuous_upper_bound,
)
from .corrections import rollout_correction
from .kl import kl_k3
from .objective import Objective
from .overlong import soft_overlong_penalty
from .policy_loss import PolicyLoss, policy_loss
from .presets import PRESETS, get_preset

__all__ = [
    "PRESETS",
    "Objective",
    "PolicyLoss",
    "aggregation_weights",
    "dynamic_clip_bounds",
    "fixed_clip_bounds",
    "get_preset",
    "kl_k3",
    "no_clip_bounds",
    "policy_loss",
    "ripo_clip_bounds",
    "rollout_correction",
    "soft_overlong_penalty",
    "vacuous_upper_bound",
]
