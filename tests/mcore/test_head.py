"""Chunked, vocabulary-parallel log-probs and entropy against a dense log_softmax."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcpo_megatron.mcore.head import chunks as head_chunks
from dcpo_megatron.mcore.head.chunks import BLOCK_BYTES, FUSED_BLOCK_BYTES, add_product, make_settings, product_into
from dcpo_megatron.mcore.head.fused import fused_chunk_tokens
from dcpo_megatron.mcore.head.response_head import logprobs_from_hidden
from tests.mcore.head_jobs import relative

TOKENS, HIDDEN, VOCAB, PADDED = 7, 6, 11, 16
NAMES = ("logprobs", "entropy", "hidden.grad", "weight.grad")


def inputs(tokens=TOKENS, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator) * scale
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    # The last row is the last real one: the first padded row stands right behind it.
    targets = torch.cat([torch.tensor([VOCAB - 1, 0]), torch.randint(VOCAB, (tokens,), generator=generator)])[:tokens]
    coefficients = torch.randn(2, tokens, generator=generator)
    return hidden, weight, targets, coefficients


def dense(hidden, weight, targets, temperature):
    logp = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def with_gradients(function, hidden, weight, coefficients):
    """Outputs of ``function(hidden, weight)`` and the gradients of a weighted sum of log-probs and entropies."""
    hidden, weight = (t.clone().requires_grad_() for t in (hidden, weight))
    logprobs, entropy = function(hidden, weight)
    (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def assert_equal(found, expected):
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        assert relative(ours, theirs) < 1e-6, name


@pytest.mark.parametrize("part", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(1, None), (3, 4), (1000, 1), (2, 1000)])
def test_values_and_gradients_equal_a_dense_log_softmax(chunk_tokens, chunk_vocab, temperature, part):
    hidden, weight, targets, coefficients = inputs()
    coefficients = coefficients * torch.tensor({"logprobs": [1, 0], "entropy": [0, 1], "both": [1, 1]}[part])[:, None]
    found = with_gradients(
        lambda h, w: logprobs_from_hidden(
            h,
            w,
            targets,
            vocab=VOCAB,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            chunk_vocab=chunk_vocab,
        ),
        hidden,
        weight,
        coefficients,
    )
    expected = with_gradients(
        lambda h, w: dense(h, w, targets, temperature), hidden.double(), weight.double(), coefficients.double()
    )
    assert found[2].abs().max() > 1e-3  # else equality would say nothing
    assert_equal(found, expected)


def test_rows_of_padding_get_no_probability_and_no_gradient():
    hidden, weight, targets, coefficients = inputs()
    outputs = []
    for scale in (1.0, 1e4):
        changed = weight.clone()
        changed[VOCAB:] *= scale
        outputs.append(
            with_gradients(lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB), hidden, changed, coefficients)
        )
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
    assert not outputs[1][3][VOCAB:].any()
    every_token = torch.arange(VOCAB)
    logprobs, _ = logprobs_from_hidden(hidden[:1].expand(VOCAB, -1), changed, every_token, vocab=VOCAB)
    assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_a_uniform_distribution_has_the_logarithm_of_the_vocabulary_as_entropy():
    logprobs, entropy = logprobs_from_hidden(
        torch.zeros(2, HIDDEN), torch.ones(PADDED, HIDDEN), torch.tensor([0, 5]), vocab=VOCAB
    )
    assert logprobs.tolist() == pytest.approx([-math.log(VOCAB)] * 2)
    assert entropy.tolist() == pytest.approx([math.log(VOCAB)] * 2)


def test_very_sure_and_very_large_logits_stay_finite():
    hidden, weight, targets, coefficients = inputs(scale=1000.0)
    found = with_gradients(lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB), hidden, weight, coefficients)
    assert all(t.isfinite().all() for t in found)
    expected = dense(hidden.double(), weight.double(), targets, 1.0)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-3)


def test_bfloat16_inputs_are_added_up_in_float32_and_give_gradients_of_their_own_dtype():
    hidden, weight, targets, coefficients = inputs(tokens=40)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    found = with_gradients(
        lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB, chunk_tokens=2, chunk_vocab=3),
        hidden,
        weight,
        coefficients,
    )
    assert [t.dtype for t in found] == [torch.float32] * 2 + [torch.bfloat16] * 2
    expected = with_gradients(
        lambda h, w: dense(h, w, targets, 1.0), hidden.double(), weight.double(), coefficients.double()
    )
    # Values have the error of fp32; gradients are rounded to bf16 once, after all chunks (unit roundoff 2^-8).
    for ours, theirs, limit in zip(found, expected, (1e-6, 1e-6, 4e-3, 4e-3), strict=True):
        assert relative(ours, theirs) < limit


def test_the_gradients_are_those_of_finite_differences():
    hidden, weight, targets, _ = inputs(tokens=4)
    for part in (0, 1):
        assert torch.autograd.gradcheck(
            lambda h, w, part=part: logprobs_from_hidden(
                h, w, targets, vocab=VOCAB, temperature=0.7, chunk_tokens=3, chunk_vocab=4
            )[part],
            [t.double().requires_grad_() for t in (hidden, weight)],
        )


class LargestTensor(TorchDispatchMode):
    """The most elements of a tensor that any operation returns, views of the weight aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None and not function.is_view:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_block_of_logits_beside_the_gradients_themselves():
    tokens, hidden_size, vocab, chunk_tokens, chunk_vocab = 512, 4, 1024, 32, 64
    hidden, weight = torch.randn(tokens, hidden_size), torch.randn(vocab, hidden_size)
    targets = torch.randint(vocab, (tokens,))
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with LargestTensor() as seen:
        logprobs, entropy = logprobs_from_hidden(
            *leaves, targets, vocab=vocab, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab
        )
        assert seen.elements <= max(chunk_tokens * chunk_vocab, 8 * tokens)
        (logprobs + entropy).sum().backward()
    assert chunk_tokens * chunk_vocab <= seen.elements <= max(vocab, tokens) * hidden_size


def saved_bytes(function) -> tuple[int, object]:
    """Bytes that ``function()`` keeps for a backward pass, and what it returned."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        result = function()
    return sum(kept), result


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary_and_without_gradients_nothing_is():
    targets = torch.zeros(50, dtype=torch.long)
    sizes = []
    for vocab in (64, 4096):
        hidden, weight = torch.randn(50, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
        size, (logprobs, _) = saved_bytes(partial(logprobs_from_hidden, hidden, weight, targets, vocab=vocab))
        sizes.append(size - weight.numel() * 4)  # the parameter itself, which exists anyway
        assert logprobs.requires_grad
    # Hidden states, targets, log-sum-exp and entropy.
    assert sizes == [50 * (8 * 4 + 8 + 4 + 4)] * 2
    with torch.no_grad():
        size, results = saved_bytes(partial(logprobs_from_hidden, hidden, weight, targets, vocab=vocab))
    assert size == 0
    assert all(t.grad_fn is None and not t.requires_grad for t in results)


def test_a_temperature_or_chunk_that_cannot_be_is_refused():
    hidden, weight, targets, _ = inputs()
    for settings, words in (({"temperature": 0.0}, "temperature=0.0"), ({"chunk_tokens": 0}, "chunk_tokens=0")):
        with pytest.raises(ValueError, match=words):
            logprobs_from_hidden(hidden, weight, targets, vocab=VOCAB, **settings)


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    hidden, weight, targets, coefficients = inputs(tokens=0)
    logprobs, entropy, grad_hidden, grad_weight = with_gradients(
        lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB), hidden, weight, coefficients
    )
    assert logprobs.shape == entropy.shape == (0,)
    assert grad_hidden.shape == (0, HIDDEN)
    assert grad_weight.shape == weight.shape and not grad_weight.any()


@pytest.mark.parametrize("chunk_tokens", [16, 1000, 1024, 8192])
@pytest.mark.parametrize("rows", [128, 19_072, 151_936])
def test_by_default_a_block_of_logits_keeps_its_budget_of_bytes(chunk_tokens, rows):
    weight = torch.empty(rows, 1, device="meta")
    settings = make_settings(weight, vocab=rows, temperature=1.0, group=None, blocks=None, chunk_tokens=chunk_tokens)
    assert 4 * chunk_tokens * settings.chunk_vocab <= BLOCK_BYTES["cpu"]
    assert settings.chunk_vocab % 128 == 0
    tokens = fused_chunk_tokens(weight, chunk_tokens)
    assert tokens <= chunk_tokens and 4 * tokens * rows <= FUSED_BLOCK_BYTES["cpu"]

    assert tokens < 128 or tokens % 128 == 0 or tokens == chunk_tokens


class Products(TorchDispatchMode):
    """Notes the operators, and where in its storage each product's left factor begins, in bytes."""

    def __init__(self):
        super().__init__()
        self.names, self.begins = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if function.name() == "aten::mm.dtype":
            self.begins.append(args[0].storage_offset() * args[0].element_size())
        return function(*args, **(kwargs or {}))


def meta_tensors_know_addmm_with_another_type_of_output() -> bool:
    out, left = torch.empty(2, 2, device="meta"), torch.empty(2, 2, dtype=torch.bfloat16, device="meta")
    try:
        torch.addmm(out, left, left, out_dtype=out.dtype, out=out)
    except TypeError:  # torch 2.11
        return False
    return True


@pytest.mark.parametrize("in_place", [True, False])
def test_torch_takes_the_products_that_only_a_gpu_makes(monkeypatch, in_place):
    if in_place and not meta_tensors_know_addmm_with_another_type_of_output():
        pytest.skip(f"torch {torch.__version__} has no addmm of meta tensors with another type of output")
    # Qwen2.5-7B's width: 64 MiB of fp32 are 4,681 rows of it, which as bf16 would begin at 2 bytes.
    monkeypatch.setattr(head_chunks, "adds_in_place", lambda *_: in_place, raising=False)
    grad, hidden = torch.empty(16, 10_000, dtype=torch.bfloat16, device="meta"), torch.empty(16, 3584, device="meta")
    out = torch.empty(10_000, 3584, device="meta")
    assert product_into(out, grad.t(), hidden.bfloat16()) is out
    with Products() as products:
        add_product(out, grad.t(), hidden.bfloat16())
    if in_place:
        assert products.names[-1] == "aten::addmm.dtype_out" and not products.begins
    else:
        assert len(products.begins) == 3 and all(begin % 256 == 0 for begin in products.begins)


def test_a_device_whose_torch_cannot_add_half_precision_in_place_is_known():
    assert not head_chunks.adds_in_place("cpu", torch.bfloat16, torch.float32)
