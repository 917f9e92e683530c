"""What is optimised, as one frozen value: every axis along which GRPO, DAPO, GSPO, Dr.GRPO and DCPO differ.

    bound rule x out-of-bound treatment x ratio level x aggregation x advantage x rollout correction (+ KL, entropy)

An `Objective` holds numbers and names only; the functions of this package, and the advantages and sampling outside of
it, read their part. What cannot be meant is refused when the object is made, not when the first batch arrives.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from .bounds import dac, fixed, no_clip_bounds, ripo
from .checks import check_number, check_outer

Bounds = Literal["dac", "fixed", "ripo", "none"]
OutOfBound = Literal["zero", "cispo"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["otm", "slm", "tlm", "dr"]
Advantage = Literal["sas", "group", "mean", "leave_one_out"]
Correction = Literal["none", "tis", "mis", "icepop"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "bounds": get_args(Bounds),
    "out_of_bound": get_args(OutOfBound),
    "ratio_level": get_args(RatioLevel),
    "aggregation": get_args(Aggregation),
    "advantage": get_args(Advantage),
    "std_ddof": (0, 1),
    "correction": get_args(Correction),
    "dynamic_sampling": (False, True),
}


@dataclass(frozen=True)
class Objective:
    """One objective. The defaults are DCPO as the paper defines it (arXiv 2509.02333).

    Attributes:
        bounds: rule for the ratio's bounds: "dac" (depends on the old probability), "fixed" (1 -+ eps), "ripo", "none".
        eps_low: half-width below 1 of "dac" and "fixed".
        eps_high: half-width above 1 of "dac" and "fixed".
        ratio_max: end of DAC's upper bound, hence DAC's cap for A > 0.
        ripo_delta: delta of "ripo".
        ripo_outer: outer interval of "ripo".
        cap_negative: dual clip: for A < 0 the loss is constant beyond this ratio (arXiv 1912.09729); None = no cap.
        cap_positive: an additional end of the upper bound for A > 0, for rules other than "dac"; None = no cap.
        out_of_bound: "zero" takes the gradient of a clipped token away; "cispo" keeps it, with the clipped ratio as a
            constant weight (arXiv 2506.13585).
        ratio_level: "token", or "sequence": one geometric-mean ratio per response (GSPO, arXiv 2507.18071).
        aggregation: from token losses to one number, see `aggregation_weights`.
        advantage: "sas" (needs a reward history), "group" z-score, "mean" only (Dr.GRPO), "leave_one_out".
        std_ddof: 0 population, 1 sample standard deviation, for "sas" and "group".
        correction: weight for the gap between training and rollout engine, see `rollout_correction`.
        correction_cap: C of "tis" and "mis".
        correction_low: lower end of "icepop".
        correction_high: upper end of "icepop".
        kl_coef: coefficient of the k3 KL divergence to a reference policy; 0 = no reference needed.
        kl_cap: largest k3 of a token, flat beyond (verl, NeMo-RL and the official code use 10); None = no cap.
        entropy_coef: coefficient of the entropy bonus.
        dynamic_sampling: keep only prompts with 0 < correct < G (DAPO, arXiv 2503.14476).
        overlong_buffer: tokens before the length limit over which the soft overlong penalty grows; 0 = no penalty.

    Raises:
        ValueError: a value or a combination that cannot be meant; the message names the field, the value, what is
            allowed.
    """

    bounds: Bounds = "dac"
    eps_low: float = 0.16
    eps_high: float = 0.20
    ratio_max: float = 10.0
    ripo_delta: float = 0.05
    ripo_outer: tuple[float, float] = (0.5, 10.0)
    cap_negative: float | None = 10.0
    cap_positive: float | None = None
    out_of_bound: OutOfBound = "zero"
    ratio_level: RatioLevel = "token"
    aggregation: Aggregation = "otm"
    advantage: Advantage = "sas"
    std_ddof: Literal[0, 1] = 0
    correction: Correction = "none"
    correction_cap: float = 2.0
    correction_low: float = 0.5
    correction_high: float = 5.0
    kl_coef: float = 0.0
    kl_cap: float | None = None
    entropy_coef: float = 0.0
    dynamic_sampling: bool = False
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            # Compare types too: True == 1, and a YAML "yes" must not become a degree of freedom.
            if not any(value == choice and type(value) is type(choice) for choice in allowed):
                raise ValueError(f"{name} = {value!r} is not known; allowed: {', '.join(map(repr, allowed))}")
        for name in ("eps_low", "eps_high", "ripo_delta", "correction_low", "kl_coef", "entropy_coef"):
            check_number(name, getattr(self, name), minimum=0.0)
        check_number("ratio_max", self.ratio_max, above=1.0)
        check_number("correction_cap", self.correction_cap, above=0.0)
        check_number("correction_high", self.correction_high, above=self.correction_low)
        for name in ("cap_negative", "cap_positive"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=1.0)
        if self.kl_cap is not None:
            check_number("kl_cap", self.kl_cap, above=0.0)
        if not isinstance(self.ripo_outer, (tuple, list)):
            raise ValueError(f"ripo_outer = {self.ripo_outer!r} is not possible; give two numbers (low, high)")
        object.__setattr__(self, "ripo_outer", tuple(self.ripo_outer))  # a list from YAML would not hash
        check_outer("ripo_outer", self.ripo_outer)
        if type(self.overlong_buffer) is not int or self.overlong_buffer < 0:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer!r} is not possible; give a whole number of tokens >= 0"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.bounds == "fixed" and self.eps_low > 1.0:
            raise ValueError(
                f"eps_low = {self.eps_low!r} is not possible with bounds = 'fixed'; give a number in [0, 1]"
            )
        if self.bounds == "dac" and self.cap_positive is not None:
            raise ValueError(
                f"cap_positive = {self.cap_positive!r} is not possible with bounds = 'dac', whose upper bound ends at "
                "ratio_max; set ratio_max and leave cap_positive = None"
            )
        if self.ratio_level == "sequence" and self.bounds in ("dac", "ripo"):
            raise ValueError(
                f"ratio_level = 'sequence' is not possible with bounds = {self.bounds!r}, which bound one token's "
                "ratio; allowed: 'fixed', 'none'"
            )
        if self.out_of_bound == "cispo" and (self.cap_negative is not None or self.cap_positive is not None):
            raise ValueError(
                f"cap_negative = {self.cap_negative!r}, cap_positive = {self.cap_positive!r} are not possible with "
                "out_of_bound = 'cispo', whose clip bounds the ratio for both signs already; allowed: None"
            )

    def clip_bounds(self, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) of the ratio under this objective's rule, `cap_positive` included.

        Args:
            old_logprobs: natural log-probs of the training engine before the update, any shape.

        Returns:
            two tensors, the shape of `old_logprobs`, detached, at least float32; upper is +inf only for bounds
            "none" without a cap.
        """
        if self.bounds == "dac":
            lower, upper = dac(old_logprobs, self.eps_low, self.eps_high, self.ratio_max)
        elif self.bounds == "fixed":
            lower, upper = fixed(old_logprobs, self.eps_low, self.eps_high)
        elif self.bounds == "ripo":
            lower, upper = ripo(old_logprobs, self.ripo_delta, self.ripo_outer)
        else:
            lower, upper = no_clip_bounds(old_logprobs)
        return lower, upper.clamp(max=math.inf if self.cap_positive is None else self.cap_positive)
