"""Triton's kernels against the plain PyTorch path, in Triton's interpreter where there is no GPU, and who is chosen
when."""

import importlib.util
import os
import subprocess
import sys
import sysconfig

import pytest
import torch

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.gpus import visible_gpus
from dcpo_megatron.mcore.head import torch_blocks as head_torch
from dcpo_megatron.mcore.head.backend import head_blocks, missing_to_build
from dcpo_megatron.mcore.platform import select_platform
from dcpo_megatron.training.checks import _package_problems

PROGRAM = """
import sys

import torch
from dcpo_megatron.mcore.head import torch_blocks as head_torch
from dcpo_megatron.mcore.head import triton_blocks as head_triton
from dcpo_megatron.mcore.platform import prepare, select_platform

device = sys.argv[1]
prepare(select_platform(device))
from dcpo_megatron.mcore.head.response_head import logprobs_from_hidden, loss_from_hidden
from tests.mcore.head_jobs import relative

torch.set_num_threads(1)
torch.set_default_device(device)
torch.manual_seed(0)
# A GPU's reductions take their numbers in another order.
close = 2e-6 if device == "cpu" else 1e-5
# Less than a kernel's columns, exactly as many, some more.
for width in (5, 2048, 2085):
    logits = torch.randn(6, width) * torch.tensor([1.0, 20.0, 1e3, 1.0, 1.0, 0.0])[:, None] - 3.0
    columns = torch.tensor([0, width - 1, 3, -1, width, 2])  # two are not in this block
    found, expected = head_triton.block_statistics(logits, columns), head_torch.block_statistics(logits, columns)
    torch.testing.assert_close(found, expected, rtol=close, atol=1e-5)
    log_sum = logits.logsumexp(-1) + 0.3
    entropy, grad_logprobs, grad_entropy = torch.rand(6), torch.randn(6), torch.randn(6)
    for grad in (grad_entropy, None):
        for dtype in (torch.float32, torch.bfloat16):
            settings = (columns, log_sum, entropy, grad_logprobs, grad, dtype)
            expected = head_torch.block_gradient(logits.clone(), *settings)
            found = head_triton.block_gradient(logits.clone(), *settings)
            assert found.dtype == expected.dtype == dtype
            assert expected.float().abs().max() > 1e-3
            for row, (ours, theirs) in enumerate(zip(found, expected)):
                error = relative(ours, theirs)
                # The interpreter cuts where PyTorch rounds to bf16: one unit of 2^-7 at most.
                assert error < (close if dtype == torch.float32 else 8e-3), (width, row, error)

tokens, vocab = 9, 3000
hidden, weight, targets = torch.randn(tokens, 8), torch.randn(3072, 8), torch.randint(vocab, (tokens,))
coefficients = torch.randn(2, tokens)

def token_loss(logprobs, entropy, part):
    return (coefficients[0, part] * logprobs + coefficients[1, part] * entropy).sum()

for fused in (False, True):
    runs = []
    for head in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        settings = dict(vocab=vocab, temperature=0.7, chunk_tokens=4, head=head)
        if fused:
            loss, *values = loss_from_hidden(*leaves, targets, token_loss, **settings)
        else:
            values = logprobs_from_hidden(*leaves, targets, **settings)
            loss = token_loss(*values, slice(None))
        loss.backward()
        runs.append([*values, *(leaf.grad for leaf in leaves)])
    assert not runs[0][3][vocab:].any()
    for found, expected in zip(*runs, strict=True):
        assert relative(found, expected) < close
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_tritons_interpreter_the_kernels_give_what_plain_pytorch_gives():
    run_program("cpu", TRITON_INTERPRET="1")


# Asked of the driver: in this process the stand-ins of the CPU platform hide a GPU.
@pytest.mark.skipif(torch.version.cuda is None or not visible_gpus(), reason="there is no GPU")
def test_on_a_gpu_the_compiled_kernels_give_what_plain_pytorch_gives():
    run_program("cuda")


def run_program(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if device == "cpu" and "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this numpy (3.6 with numpy 2.5)")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal\n")


def test_without_a_gpu_auto_is_plain_pytorch():
    assert head_blocks("auto", "cpu") is head_torch
    assert head_blocks("torch", "cuda") is head_torch


def test_triton_demanded_where_it_cannot_be_had_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "triton does not import" if importlib.util.find_spec("triton") is None else "there is no GPU"
    with pytest.raises(ValueError, match=f"model.head=triton, but {reason}: set model.head=auto"):
        head_blocks("triton", "cpu")
    with pytest.raises(ValueError, match=r"model.head='liger' is not known: use auto, torch, triton"):
        head_blocks("liger", "cpu")


def test_a_run_that_demands_triton_is_refused_before_it_starts_where_it_cannot_be_had(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for head, refused in (("triton", True), ("torch", False), ("auto", False)):
        config = load_config([], ["model.path=somewhere", "data.files=[some.jsonl]", f"model.head={head}"])
        found = [line for line in _package_problems(config, select_platform("cpu")) if "model.head" in line]
        assert len(found) == refused
        assert all(
            line.startswith("model.head=triton, but ") and line.endswith(": set model.head=auto") for line in found
        )


@pytest.fixture
def a_gpu_without(monkeypatch, tmp_path):
    """A host with Triton where kernels cannot be built: no compiler on the path, or no Python.h."""

    def lack(compiler: bool):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("CC", raising=False)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: True if name == "triton" else find_spec(name, *rest)
        )
        if compiler:
            monkeypatch.setenv("PATH", str(tmp_path))
        else:
            gcc = tmp_path / "gcc"
            gcc.write_text("")
            gcc.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path))
            monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: {"include": str(tmp_path)})

    return lack


@pytest.mark.parametrize(("compiler", "reason"), [(True, "neither gcc nor clang"), (False, "there is no .*/Python.h")])
def test_where_kernels_cannot_be_built_auto_is_plain_pytorch_and_triton_is_refused(a_gpu_without, compiler, reason):
    a_gpu_without(compiler)
    assert head_blocks("auto", "cuda") is head_torch
    with pytest.raises(ValueError, match=f"model.head=triton, but Triton needs .*{reason}.*: set model.head=auto"):
        head_blocks("triton", "cuda")


def test_a_compiler_that_is_named_and_not_there_is_named_again(a_gpu_without, monkeypatch):
    a_gpu_without(compiler=True)
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "CC=/nowhere/cc is none" in missing_to_build()
