"""Runs layouts against the dense reference and says where they differ.

Relative error = norm of the difference over norm of the reference, per parameter; the worst of all parameters counts.
Where a reference gradient is all but zero (below 1e-6 of the whole gradient's norm), the difference is held against
that floor instead.

Parameters are held by their UPDATE. SGD's one step is held against the reference's gradient. Adam runs two steps with
weight decay and clipping: it divides by the gradient's own size, so where a gradient is near eps its last bits move the
parameter by up to lr. So Adam is held against AdamW written out on the layout's own gradients, the first of which the
column before has compared with the reference.

In bfloat16 no constant would do: its rounding costs one parameter's gradient 1 %, and 7 % that of a bias whose terms
all but cancel. So there

    error = |layout in bf16 - dense in fp32|  /  |dense in bf16 - dense in fp32|        of every parameter; at most 8

where "dense" is the reference on the same weights, which bf16 holds exactly. No old log-prob lies within 0.05 nats of a
bound: a token that is clipped in one process and not in the other would move the gradient by itself, and no rounding
error bounds that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.objectives import Objective
from dcpo_megatron.verification import cases
from dcpo_megatron.verification.layouts import Layout
from dcpo_megatron.verification.measure import exact_products, objective_settings
from dcpo_megatron.verification.ranks import RankFailure, RankPool

GRADIENT_TOLERANCE = 2e-5
PARAMETER_TOLERANCE = 2e-5
DISTRIBUTION_TOLERANCE = 1e-5
HISTORY_TOLERANCE = 1e-12
# Megatron-Core keeps hold of process groups that were destroyed, and gloo's threads with them: ranks are renewed now
# and then.
RUNS_OF_A_POOL = 8
# Nats between a token and the next bound in bfloat16: five times what its rounding moves a log-prob of these models.
JUMP_MARGIN = 0.05
RATES = {"adam": 1e-3, "sgd": 0.1}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "clip_grad": 0.5}


@dataclass(frozen=True)
class Bounds:
    """What errors may be, and ``roundoff``: how far a parameter may lie from the exact update, relative, because it is
    stored so."""

    error: float
    distribution: float
    roundoff: float


BOUNDS = {
    "float32": Bounds(GRADIENT_TOLERANCE, DISTRIBUTION_TOLERANCE, 2.0**-23),
    "bfloat16": Bounds(8.0, 8.0, 2.0**-8),
}


@dataclass
class Verdict:
    """One layout under one objective. In fp32 errors are relative for loss, gradients and parameters, absolute (nats)
    for log-probs and entropies; in bf16 they are multiples of what bf16 costs the reference, but for Adam and the
    history."""

    layout: str
    objective: str
    world: int
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    worst_parameter: str = ""
    # None: another objective was the one that stepped.
    sgd_error: float | None = None
    adam_error: float | None = None
    norm_error: float | None = None
    distribution_error: float = float("nan")
    history_error: float = float("nan")  # inf: not the same bits on every rank
    replicas_agree: bool = False  # after the steps, every replica of every parameter holds the same bits
    seconds: float = 0.0
    failure: str = ""
    dtype: str = "float32"

    @property
    def passed(self) -> bool:
        if self.failure:
            return False
        bounds = BOUNDS[self.dtype]
        # A NaN is not at most anything: it fails.
        checks = [
            self.replicas_agree,
            self.loss_error <= bounds.error,
            self.gradient_error <= bounds.error,
            self.distribution_error <= bounds.distribution,
            self.history_error <= HISTORY_TOLERANCE,
            self.adam_error is None or self.adam_error <= PARAMETER_TOLERANCE,
        ]
        checks += [e <= bounds.error for e in (self.sgd_error, self.norm_error) if e is not None]
        return all(checks)


def certify(
    layouts: Sequence[Layout],
    objectives: dict[str, Objective],
    *,
    device: str = "cpu",
    megatron_path: str | None = None,
    report: Callable[[Verdict], None] | None = None,
    sabotage: str | None = None,
    pool: RankPool | None = None,
    timeout: float = 300.0,
    seed: int = 0,
    dtype: str = "float32",
    transformer_engine: str = "off",
) -> list[Verdict]:
    """Measures every layout and compares it; ``report`` is called as verdicts come. A layout whose ranks fail gets a
    verdict that says so.

    Args:
        megatron_path: a folder with another ``megatron`` package, put first on the ranks' import path.
        dtype: "float32" or "bfloat16", of weights and activations.
        transformer_engine: "off" (Megatron-Core's layers with this project's norm and attention), "on", or "auto", as
            in ``model.transformer_engine``.
        sabotage: see :func:`~dcpo_megatron.verification.measure.measure`.
        pool: ranks to use instead of starting some.
    """
    exact_products()
    verdicts: list[Verdict] = []
    own_pool = pool is None
    with tempfile.TemporaryDirectory(prefix="dcpo-verify-") as folder:
        models = {layout.model for layout in layouts}
        prepared = {kind: _prepare(kind, folder, objectives, seed, dtype) for kind in models}
        try:
            for number, layout in enumerate(layouts):
                worn = own_pool and pool is not None and (pool.runs >= RUNS_OF_A_POOL or pool.size < layout.world)
                if worn:
                    pool.close()
                if pool is None or pool.size == 0:
                    own_pool = True  # also where a caller's pool has died
                    size = max(following.world for following in layouts[number : number + RUNS_OF_A_POOL])
                    pool = RankPool(size, device=device, python_path=[megatron_path] if megatron_path else [])
                started = time.perf_counter()
                bundle = prepared[layout.model]
                try:
                    measured = pool.run(
                        "dcpo_megatron.verification.measure:measure",
                        layout.world,
                        layout,
                        bundle.folder,
                        bundle.items,
                        objectives,
                        rates=RATES,
                        adam=ADAM,
                        dtype=dtype,
                        transformer_engine=transformer_engine,
                        device=device,
                        sabotage=sabotage,
                        timeout=timeout,
                    )[0]
                except RankFailure as error:
                    new = [Verdict(layout.name, name, layout.world, failure=str(error).strip()) for name in objectives]
                else:
                    new = _compare(layout, bundle, measured, objectives)
                for verdict in new:
                    verdict.dtype = dtype
                    verdict.seconds = (time.perf_counter() - started) / len(new)
                    verdicts.append(verdict)
                    if report is not None:
                        report(verdict)
        finally:
            if own_pool and pool is not None:
                pool.close()
    return verdicts


@dataclass
class _Bundle:
    folder: str
    items: list[cases.Item]
    references: dict
    units: dict[str, _Units]
    start: dict[str, torch.Tensor]
    roundoff: float


@dataclass(frozen=True)
class _Units:
    """What errors are multiples of, relative as they are: those of the reference itself in bf16. All 1 in fp32."""

    loss: float
    gradients: dict[str, float]
    norm: float
    distribution: float


def _prepare(kind: str, folder: str, objectives: dict[str, Objective], seed: int, dtype: str = "float32") -> _Bundle:
    from dcpo_megatron.verification import reference as dense

    path = os.path.join(folder, kind)
    rounded = dtype != "float32"
    cases.make_model(kind, path, seed, getattr(torch, dtype))
    model = dense.load_model(path)
    items = cases.make_items(seed)
    settings = {name: objective_settings(objective) for name, objective in objectives.items()}
    with torch.no_grad():
        current = [dense.token_distribution(model, item, cases.TEMPERATURE)[0] for item in items]

    def refused(logp: torch.Tensor, item: cases.Item) -> torch.Tensor:
        return dense.near_a_jump(logp, item, list(settings.values()), JUMP_MARGIN)

    cases.attach_old_logprobs(items, current, refused=refused if rounded else None)

    def references(model) -> dict:
        found = {name: dense.dense_reference(model, items, own, cases.TEMPERATURE) for name, own in settings.items()}
        for result in found.values():
            result.gradients = _checkpoint_form(model, result.gradients)
        return found

    exact = references(model)
    again = references(dense.load_model(path, getattr(torch, dtype))) if rounded else {}
    units = {name: _units(result, again.get(name)) for name, result in exact.items()}
    start = _checkpoint_form(model, {name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return _Bundle(path, items, exact, units, start, BOUNDS[dtype].roundoff)


def _units(exact, rounded) -> _Units:
    """The reference's own errors where ``rounded`` is the same in bf16; else 1."""
    if rounded is None:
        return _Units(1.0, dict.fromkeys(exact.gradients, 1.0), 1.0, 1.0)
    floor = _floor(exact.gradients)
    gradients = {name: _relative(rounded.gradients[name], wanted, floor) for name, wanted in exact.gradients.items()}
    lost = sum(float((rounded.gradients[n] - wanted).double().pow(2).sum()) for n, wanted in exact.gradients.items())
    pairs = zip([*rounded.logprobs, *rounded.entropies], [*exact.logprobs, *exact.entropies])
    distribution = _largest(float((a - b).abs().max()) for a, b in pairs)
    # A ratio moves by as much as its log-prob, and a token's loss with it; their sum may all but cancel, by luck too.
    loss = distribution * exact.magnitude / max(abs(exact.loss), 1e-6)
    return _Units(loss, gradients, (lost / _square(exact.gradients)) ** 0.5, distribution)


def _checkpoint_form(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under a checkpoint's names, as transformers itself writes them: it holds the experts of a layer in one tensor,
    checkpoints name each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _relative(measured: torch.Tensor, wanted: torch.Tensor, floor: float) -> float:
    difference = (measured.double() - wanted.double()).norm()
    return float(difference / max(float(wanted.double().norm()), floor))


def _square(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(t.double().pow(2).sum()) for t in tensors.values())


def _floor(gradients: dict[str, torch.Tensor]) -> float:
    """The least norm that an error is held against."""
    return max(1e-6 * _square(gradients) ** 0.5, 1e-30)


def _worst(measured: dict, wanted: dict, units: dict[str, float]) -> tuple[float, str]:
    floor = _floor(wanted)
    errors = {
        name: _relative(measured[name], tensor, floor) / units[name] if name in measured else float("inf")
        for name, tensor in wanted.items()
    }
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return errors[name], name


def _compare(layout: Layout, bundle: _Bundle, measured: dict, objectives: dict) -> list[Verdict]:
    found = []
    for name in objectives:
        reference, units = bundle.references[name], bundle.units[name]
        gradient_error, worst = _worst(measured["gradients"][name], reference.gradients, units.gradients)
        distribution_error = _largest(
            float((a - b).abs().max())
            for kind, wanted in (("logprobs", reference.logprobs), ("entropies", reference.entropies))
            for extreme in measured[kind]  # the lowest and the highest that any rank has
            for a, b in zip(extreme, wanted)
        )
        verdict = Verdict(
            layout.name,
            name,
            layout.world,
            loss_error=abs(measured["loss"][name] - reference.loss) / max(abs(reference.loss), 1e-6) / units.loss,
            gradient_error=gradient_error,
            worst_parameter=worst,
            distribution_error=distribution_error / units.distribution,
            history_error=_compare_history(bundle.items, measured),
            replicas_agree=measured["replicas_agree"],
        )
        if name == list(objectives)[-1]:
            _compare_steps(verdict, bundle, measured, reference.gradients, units)
        found.append(verdict)
    return found


def _compare_history(items: list[cases.Item], measured: dict) -> float:
    """Largest absolute difference between the layout's reward history and that of one process; inf where its ranks
    disagree in a single bit."""
    alone = RewardHistory()
    for visit in range(cases.VISITS):
        ids, rewards = cases.visit_rewards(items, visit)
        alone.observe(ids, torch.tensor(rewards, dtype=torch.float64))
    if not measured["history_is_one"]:
        return float("inf")
    shared = RewardHistory()
    shared.load_state_dict(measured["history"])
    worst = 0.0
    for prompt_id in dict.fromkeys(ids):
        a, b = alone.statistics(prompt_id), shared.statistics(prompt_id)
        worst = _largest([worst, *(abs(float(x) - float(y)) for x, y in zip(a, b))])
    return worst


def _compare_steps(verdict: Verdict, bundle: _Bundle, measured: dict, wanted: dict, units: _Units) -> None:
    from dcpo_megatron.verification import reference as dense

    sgd = dense.sgd_step(bundle.start, wanted, RATES["sgd"])
    verdict.sgd_error = _worst_update(bundle, measured["parameters"]["sgd"], sgd, units.gradients)
    adam = dense.adamw_steps(bundle.start, measured["adam_gradients"], RATES["adam"], ADAM)
    verdict.adam_error = _worst_update(bundle, measured["parameters"]["adam"], adam, dict.fromkeys(adam, 1.0))
    norm = dense.gradient_norm(wanted)
    verdict.norm_error = _largest(abs(value - norm) / norm / units.norm for value in measured["norm"].values())


def _worst_update(bundle: _Bundle, measured: dict, wanted: dict, units: dict[str, float]) -> float:
    """Error of the UPDATE (not of the parameter, which is much larger), beyond what rounding the stored parameter
    explains."""
    errors = []
    for name, target in wanted.items():
        start = bundle.start[name].double()
        update = (target.double() - start).norm()
        error = (measured[name].double() - target.double()).norm() - bundle.roundoff * start.norm()
        error = error.clamp(min=0) / units[name]
        errors.append(float(error / update) if float(update) else float(error))
    return _largest(errors)


def _largest(values) -> float:
    """The largest value; NaN where there is one (``max`` would let it slip)."""
    found = list(values)
    return float("nan") if any(value != value for value in found) else max(found, default=0.0)


def write_json(verdicts: Sequence[Verdict], path: str | os.PathLike, facts: dict) -> None:
    """All verdicts with the versions they were measured with."""
    rows = [dataclasses.asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
    # JSON has neither NaN nor infinity.
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    Path(path).write_text(json.dumps({**facts, "verdicts": rows}, indent=1) + "\n", encoding="utf-8")


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def markdown_table(verdicts: Sequence[Verdict]) -> str:
    """One row a layout: the worst of its objectives."""
    lines = [
        (
            "| layout | ranks | objectives | worst gradient error | where (objective, parameter) | loss | gradient norm"
            " | SGD step | Adam step | log-probs, entropy (nats) | SAS history | verdict |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(verdict.layout for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.layout == name]
        worst = max(rows, key=lambda v: v.gradient_error if v.gradient_error == v.gradient_error else float("inf"))
        verdict = "pass" if all(v.passed for v in rows) else "**FAIL**"
        lines.append(
            f"| {name} | {worst.world} | {len(rows)} | {worst.gradient_error:.1e} | {worst.objective},"
            f" {worst.worst_parameter} | {max(v.loss_error for v in rows):.1e} | {_show(rows[-1].norm_error)} |"
            f" {_show(rows[-1].sgd_error)} | {_show(rows[-1].adam_error)} |"
            f" {max(v.distribution_error for v in rows):.1e} | {rows[-1].history_error:.0e} | {verdict} |"
        )
    return "\n".join(lines)
