"""Weights between a Hugging Face folder or engine and the sharded Megatron model of a running job.

:func:`load_hf_weights` fills this rank's chunks, each rank reading its own tensors. :class:`WeightGatherer` goes the other way: every rank walks the same global
list of parameters, one at a time,

    tensor-parallel all-gather -> expert-parallel all-gather -> broadcast from its pipeline stage -> split into Hugging Face tensors

so that every rank sees every full tensor once and no more than one Megatron parameter (of one layer) is held at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dcpo_megatron.mcore.collectives import all_gather_bytes
from dcpo_megatron.mcore.layout import RankPosition
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.mapping import Rule, merge, rule_for, shard, split, unshard


def local_rules(model: PolicyModel) -> list[tuple[str, torch.nn.Parameter, Rule]]:
    """``(name, parameter, rule)`` of every parameter this rank holds, chunk by chunk, in ``named_parameters`` order."""
    found = []
    expert_offset = model.position.expert_rank * (model.shape.experts // model.position.expert_size)
    for number, chunk in enumerate(model.modules):
        offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, parameter in chunk.named_parameters():
            found.append(
                (f"chunk{number}.{name}", parameter, rule_for(name, offset, expert_offset, model.shape.tied_embeddings))
            )
    return found


def _tensor_rank(position: RankPosition, rule: Rule) -> tuple[int, int, dist.ProcessGroup]:
    if rule.expert:
        return position.expert_tensor_rank, position.expert_tensor_size, position.expert_tensor_group
    return position.tensor_rank, position.tensor_size, position.tensor_group


@torch.no_grad()
def load_hf_weights(model: PolicyModel, folder) -> None:
    """Fills the model's parameters from a Hugging Face folder, before :meth:`PolicyModel.make_trainable`.

    Raises:
        CheckpointError: a tensor that is missing, has another shape than config.json says, or belongs to no part of the model.
    """
    source = SafetensorsFolder(folder)
    for name, parameter, rule in local_rules(model):
        tensors = [source.read(hf) for hf in rule.hf_names]
        if rule.vocab and tensors[0].shape[0] != model.shape.vocab:
            raise CheckpointError(
                f"{folder}: {rule.hf_names[0]} has {tensors[0].shape[0]} rows, config.json says vocab_size {model.shape.vocab}: "
                "the weights do not fit config.json"
            )
        rank, size, _ = _tensor_rank(model.position, rule)
        rows = parameter.shape[0] * size if rule.vocab else None
        try:
            part = shard(rule, merge(rule, tensors, model.shape, rows), rank, size)
        except RuntimeError as error:
            shapes = ", ".join(f"{hf} {tuple(t.shape)}" for hf, t in zip(rule.hf_names, tensors, strict=True))
            raise CheckpointError(
                f"{folder}: {shapes} do not fit config.json ({error}): is it a checkpoint of another size?"
            ) from None
        if part.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {' + '.join(rule.hf_names)} gives {tuple(part.shape)} for {name}, which has {tuple(parameter.shape)}: "
                "the weights do not fit config.json"
            )
        parameter.copy_(part)
    # Some tied checkpoints carry a copy of the output layer, some old ones the rotary frequencies.
    known = expected_hf_names(model.shape) | {"lm_head.weight"}
    extra = sorted(n for n in source.names() if n not in known and not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(
            f"{folder} has tensor {extra[0]!r} ({len(extra)} such), which its config.json has no place for"
        )


def expected_hf_names(shape) -> set[str]:
    """Every tensor name that a Hugging Face checkpoint of ``shape`` has."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not shape.tied_embeddings:
        names.add("lm_head.weight")
    parts = [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
    ]
    if shape.qkv_bias:
        parts.append("self_attention.linear_qkv.bias")
    if shape.qk_norm:
        parts += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    if shape.experts:
        parts.append("mlp.router.weight")
        for expert in range(shape.experts):
            parts += [f"mlp.experts.local_experts.{expert}.linear_fc{n}.weight" for n in (1, 2)]
    else:
        parts += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    for layer in range(shape.layers):
        for part in parts:
            names.update(rule_for(f"decoder.layers.{layer}.{part}").hf_names)
    return names


@dataclass(frozen=True)
class _Entry:
    stage: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rules: tuple[Rule, ...]  # one per expert-parallel rank


class WeightGatherer:
    """Walks the whole model as Hugging Face tensors on every rank. The plan is made once (one exchange); each walk is collectives of tensors only."""

    def __init__(self, model: PolicyModel):
        self.model = model
        self.position = model.position
        self._local = {name: parameter for name, parameter, _ in local_rules(model)}
        self.plan = self._make_plan()

    def _make_plan(self) -> list[_Entry]:
        mine = []
        for name, parameter, rule in local_rules(self.model):
            rules = [rule]
            if rule.expert:
                # Expert-parallel peers hold the same local names for other experts: their Hugging Face names are worked out, not exchanged.
                per_rank = self.model.shape.experts // self.position.expert_size
                bare = name.split(".", 1)[1]
                chunk = self.model.modules[int(name.split(".", 1)[0].removeprefix("chunk"))]
                offset = chunk.decoder.layers[0].layer_number - 1
                rules = [rule_for(bare, offset, rank * per_rank) for rank in range(self.position.expert_size)]
            mine.append((name, list(parameter.shape), str(parameter.dtype).removeprefix("torch."), rules))
        encoded = json.dumps(
            [[n, s, d, [[r.kind, list(r.hf_names), r.expert, r.vocab] for r in rules]] for n, s, d, rules in mine]
        ).encode()
        entries, seen = [], set()
        for stage, payload in enumerate(
            all_gather_bytes(encoded, self.position.pipeline_group, self.model.platform.device)
        ):
            for name, shape, dtype, rules in json.loads(payload):
                parsed = tuple(Rule(k, tuple(h), e, v) for k, h, e, v in rules)
                # With tied embeddings the first and the last stage both hold the embedding: it is sent once.
                if parsed[0].hf_names in seen:
                    continue
                seen.add(parsed[0].hf_names)
                entries.append(_Entry(stage, name, tuple(shape), getattr(torch, dtype), parsed))
        return entries

    @torch.no_grad()
    def tensors(
        self, select: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``(Hugging Face name, full tensor)`` for every weight, in the same order on every rank. Every rank must walk to the end.

        ``select`` says what to take of each parameter (its gradient, say): a tensor of the parameter's shape and dtype.
        """
        position, device = self.position, self.model.platform.device
        for entry in self.plan:
            parts: list[torch.Tensor] | None = None
            if entry.stage == position.pipeline_rank:
                parts = self._join_here(entry, select)
            if position.pipeline_size > 1:
                if parts is None:
                    parts = [
                        torch.empty(self._full_shape(entry), dtype=entry.dtype, device=device) for _ in entry.rules
                    ]
                source = dist.get_global_rank(position.pipeline_group, entry.stage)
                parts = [part.contiguous() for part in parts]
                for part in parts:
                    dist.broadcast(part, source, group=position.pipeline_group)
            for rule, full in zip(entry.rules, parts, strict=True):
                yield from split(rule, full, self.model.shape)

    def _full_shape(self, entry: _Entry) -> tuple[int, ...]:
        rule = entry.rules[0]
        size = _tensor_rank(self.position, rule)[1]
        if rule.kind == "plain":
            return entry.shape
        dim = 1 if rule.kind == "row" else 0
        return tuple(n * size if d == dim else n for d, n in enumerate(entry.shape))

    def _join_here(self, entry: _Entry, select) -> list[torch.Tensor]:
        rule = entry.rules[0]
        parameter = select(self._local[entry.name])
        _, size, group = _tensor_rank(self.position, rule)
        if size > 1 and rule.kind != "plain":
            parts = [torch.empty_like(parameter) for _ in range(size)]
            dist.all_gather(parts, parameter.contiguous(), group=group)
            full = unshard(rule, parts)
        else:
            full = parameter
        if len(entry.rules) == 1:
            return [full]
        experts = [torch.empty_like(full) for _ in entry.rules]
        dist.all_gather(experts, full.contiguous(), group=self.position.expert_group)
        return experts
