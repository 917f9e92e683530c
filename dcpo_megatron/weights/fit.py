"""Holds a Hugging Face folder against its config.json before any weight is read."""

from __future__ import annotations

from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.mapping import hf_names, hf_shapes, parameter_names, rule_for


def check_folder(source: SafetensorsFolder, shape: ModelShape) -> None:
    """Holds every tensor of the folder against ``shape`` by name and size; only headers are read, on every rank alike.

    Raises:
        CheckpointError: a tensor that is missing, has another shape than config.json says, or belongs to no part of the model.
    """
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
    # Some tied checkpoints carry a copy of the output layer, some old ones the rotary frequencies.
    known = {*hf_names(shape), "lm_head.weight"}
    extra = sorted(
        n for n in {*source.names(), *source.unlisted()} if n not in known and not n.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise CheckpointError(
            f"{source.folder} has tensor {extra[0]!r} ({len(extra)} such), which its config.json has no place for"
        )
