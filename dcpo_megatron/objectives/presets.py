"""Named objectives: DCPO as in the paper and as in its official code, the baselines it is compared with, its ablations.

The baselines are set as the DCPO paper (arXiv 2509.02333, section "Experiments") runs them, not as their own papers
tune them. Each ablation is GRPO with exactly one component replaced by DCPO's. Any preset is a starting point:
`dataclasses.replace(get_preset("grpo"), kl_coef=0.001)`.
"""

import difflib
from dataclasses import replace
from typing import Any

from .objective import Objective

_GRPO = Objective(
    bounds="fixed",
    eps_low=0.2,
    eps_high=0.2,
    cap_negative=None,
    aggregation="slm",
    advantage="group",
    kl_coef=0.0,  # the scripts use 0.001, the paper gives no value; it is an option here
)

_DAC: dict[str, Any] = {"bounds": "dac", "eps_low": 0.16, "eps_high": 0.20, "ratio_max": 10.0, "cap_negative": 10.0}

PRESETS: dict[str, Objective] = {
    "dcpo-paper": replace(_GRPO, **_DAC, aggregation="otm", advantage="sas"),
    # github.com/lime-RL/DCPO. In verl/trainer/ppo/core_algos.py the dual-clip constant c (clip_ratio_c, 3.0 where
    # nothing is configured) is the cap for A < 0, and max(c, 10) the end of the upper bound. The script
    # recipe/dcpo/run_dcpo.sh (read in the fork elysiameik-afk/dcpomol) exports CLIP_RATIO_C=10.0 and
    # CLIP_RATIO_HIGH=0.28, and run_base.sh sets 0.2 below: so both caps are 10 in the published runs, and cap_negative
    # = 3.0 is what the code alone would do. Its aggregation is a masked mean over each MICRO-batch (a sum until
    # 2025-12-20) and so depends on how responses are dealt; ours is the mean over the minibatch.
    "dcpo-official-code": replace(
        _GRPO,
        bounds="dac",
        eps_low=0.20,
        eps_high=0.28,
        ratio_max=10.0,
        cap_negative=10.0,
        aggregation="tlm",
        advantage="group",
        std_ddof=1,
    ),
    "grpo": _GRPO,
    "dapo": replace(
        _GRPO,
        eps_high=0.28,
        cap_negative=10.0,
        aggregation="tlm",
        dynamic_sampling=True,
        overlong_buffer=512,
    ),
    "gspo": replace(_GRPO, eps_low=3e-4, eps_high=4e-4, ratio_level="sequence"),
    # "GRPO done right": neither the response length nor the standard deviation divides anything.
    "dr-grpo": replace(_GRPO, aggregation="dr", advantage="mean"),
    # The two-sided cap belongs to DAC: without it A < 0 would be unbounded where DAC bounds A > 0.
    "dac-only": replace(_GRPO, **_DAC),
    "sas-only": replace(_GRPO, advantage="sas"),
    "otm-only": replace(_GRPO, aggregation="otm"),
}


def get_preset(name: str) -> Objective:
    """The named objective.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"unknown objective {name!r}{hint} Known: {', '.join(PRESETS)}")
