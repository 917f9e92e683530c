"""Holds a Hugging Face folder against its config.json before any weight is read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.mapping import hf_names, hf_shapes, parameter_names, rule_for

_OUTPUT = "lm_head.weight"
# Rows of a vocabulary that are compared at once.
_ROWS = 1024


def check_folder(source: SafetensorsFolder, shape: ModelShape) -> None:
    """Holds every tensor of the folder against ``shape`` by name and size, on every rank alike. Only headers are read;
    of a tied model that has an output layer all the same, both tensors.

    Raises:
        CheckpointError: a tensor that is missing, has another shape than config.json says, or belongs to no part of the
            model; an output layer that is not the embedding that config.json ties it to.
    """
    if not shape.tied_embeddings and _OUTPUT not in source.names():
        raise CheckpointError(
            f"{source.folder} has no {_OUTPUT}, and its config.json does not tie it to the embedding: set"
            " tie_word_embeddings to true where the model's output layer is its embedding, else copy the checkpoint"
            " again"
        )
    for name in parameter_names(shape):
        rule = rule_for(name, shape)
        for hf, wanted in zip(rule.hf_names, hf_shapes(rule, shape), strict=True):
            found = source.shape(hf)
            if found != wanted:
                raise CheckpointError(
                    f"{source.folder}: {hf} is {list(found)}, config.json makes it {list(wanted)} "
                    f"({' x '.join(rule.sizes[rule.hf_names.index(hf)])}): is it a checkpoint of another size?"
                )
        dtypes = {source.dtype(hf) for hf in rule.hf_names}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{source.folder}: {', '.join(rule.hf_names)} become one tensor and have different dtypes "
                f"({', '.join(sorted(map(str, dtypes)))}): save the checkpoint in one dtype"
            )
    # Some tied checkpoints carry a copy of the embedding as output layer, some old ones the rotary frequencies.
    copy = {_OUTPUT} & source.names()
    if copy and shape.tied_embeddings:
        (embedding,) = rule_for("embedding.word_embeddings.weight", shape).hf_names
        wanted, found = source.shape(embedding), source.shape(_OUTPUT)
        if found != wanted:
            raise _untied(f"{source.folder}: {_OUTPUT}", embedding, f"is {list(found)}, {embedding} {list(wanted)}")
        check_tie(
            lambda rows: source.read(embedding, rows),
            lambda rows: source.read(_OUTPUT, rows),
            shape.vocab,
            f"{source.folder}: {_OUTPUT}",
            embedding,
        )
    known = {*hf_names(shape), *copy}
    extra = sorted(
        n for n in {*source.names(), *source.unlisted()} if n not in known and not n.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise CheckpointError(
            f"{source.folder} has tensor {extra[0]!r} ({len(extra)} such), which its config.json has no place for"
        )


def check_tie(
    embedding: Callable[[tuple[int, int]], torch.Tensor],
    output: Callable[[tuple[int, int]], torch.Tensor],
    vocab: int,
    output_name: str,
    embedding_name: str,
) -> None:
    """Holds the output layer of a tied model against its embedding; each gives its rows ``[first, last)``, [rows, H].
    Padding beyond ``vocab`` rows is not looked at.

    Raises:
        CheckpointError: they are not the same. transformers (5.12, ``tie_weights``) would train such a model untied,
            after a warning.
    """
    for first in range(0, vocab, _ROWS):
        rows = first, min(first + _ROWS, vocab)
        one, other = embedding(rows).double(), output(rows).double()
        equal = ((one == other) | (one.isnan() & other.isnan())).flatten(1).all(1)
        if not equal.all():
            raise _untied(
                output_name, embedding_name, f"differs from {embedding_name} in row {first + int(equal.int().argmin())}"
            )


def _untied(output: str, embedding: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{output} {how}, and config.json ties them (tie_word_embeddings): set it to false where the model has an"
        f" output layer of its own, else remove the tensor, and the model takes {embedding}"
    )
