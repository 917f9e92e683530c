"""Where layers come from Transformer Engine, and where asking for it is refused."""

import pytest
import torch

from dcpo_megatron.mcore import platform
from dcpo_megatron.mcore.platform import Platform, use_transformer_engine

CPU, GPU = Platform("cpu", "gloo", torch.device("cpu")), Platform("cuda", "nccl", torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("wanted", "dtype", "where", "used"),
    [
        ("auto", "bfloat16", GPU, True),
        ("auto", "float32", GPU, False),
        ("auto", "bfloat16", CPU, False),
        ("on", "bfloat16", GPU, True),
        ("on", "float32", CPU, True),
        ("off", "bfloat16", GPU, False),
    ],
)
def test_float32_and_cpus_have_the_local_layers_unless_asked(monkeypatch, wanted, dtype, where, used):
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    assert use_transformer_engine(wanted, dtype, where) is used


def test_float32_on_a_gpu_is_refused_because_it_would_be_tf32(monkeypatch):
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    with pytest.raises(ValueError, match=r"TF32.*set model\.dtype=bfloat16"):
        use_transformer_engine("on", "float32", GPU)


def test_where_it_does_not_import_auto_does_without_and_on_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: False)
    assert not use_transformer_engine("auto", "bfloat16", GPU)
    for where in (CPU, GPU):
        with pytest.raises(ValueError, match="does not import here: install it"):
            use_transformer_engine("on", "bfloat16", where)
