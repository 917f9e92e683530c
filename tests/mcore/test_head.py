"""Chunked, vocabulary-parallel log-probs and entropy against a dense log_softmax."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dcpo_megatron.mcore.platform import prepare, select_platform

# Spawned ranks import this file without conftest.
prepare(select_platform("cpu"))

from dcpo_megatron.mcore.head import logprobs_from_hidden  # noqa: E402

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
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("part", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_values_and_gradients_equal_a_dense_log_softmax(chunk_tokens, temperature, part):
    hidden, weight, targets, coefficients = inputs()
    coefficients = coefficients * torch.tensor({"logprobs": [1, 0], "entropy": [0, 1], "both": [1, 1]}[part])[:, None]
    found = with_gradients(
        lambda h, w: logprobs_from_hidden(
            h, w, targets, vocab=VOCAB, temperature=temperature, chunk_tokens=chunk_tokens
        ),
        hidden,
        weight,
        coefficients,
    )
    expected = with_gradients(lambda h, w: dense(h, w, targets, temperature), hidden, weight, coefficients)
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


def test_bfloat16_inputs_give_float32_outputs_and_gradients_of_their_own_dtype():
    hidden, weight, targets, coefficients = inputs()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, entropy, grad_hidden, grad_weight = with_gradients(
        lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB, chunk_tokens=2), hidden, weight, coefficients
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    expected = with_gradients(lambda h, w: dense(h, w, targets, 1.0), hidden.float(), weight.float(), coefficients)
    torch.testing.assert_close(logprobs, expected[0], rtol=0.02, atol=0.05)
    torch.testing.assert_close(grad_weight.float(), expected[3], rtol=0.02, atol=0.05)


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    hidden, weight, targets, coefficients = inputs(tokens=0)
    logprobs, entropy, grad_hidden, grad_weight = with_gradients(
        lambda h, w: logprobs_from_hidden(h, w, targets, vocab=VOCAB), hidden, weight, coefficients
    )
    assert logprobs.shape == entropy.shape == (0,)
    assert grad_hidden.shape == (0, HIDDEN)
    assert grad_weight.shape == weight.shape and not grad_weight.any()


# -- two vocabulary-parallel ranks --------------------------------------------------------------------------------------------------------

# Rank 1 holds some real rows, padding alone, or real rows alone.
VOCABULARIES = (VOCAB, PADDED // 2, PADDED - 1, PADDED)


def vocabulary_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    rows = slice(rank * PADDED // 2, (rank + 1) * PADDED // 2)
    results = []
    for vocab in VOCABULARIES:
        hidden, weight, targets, coefficients = inputs()
        results.append(
            with_gradients(
                lambda h, w, targets=targets % vocab, vocab=vocab: logprobs_from_hidden(
                    h, w, targets, vocab=vocab, temperature=0.7, tensor_group=dist.group.WORLD, chunk_tokens=3
                ),
                hidden,
                weight[rows],
                coefficients,
            )
        )
    hidden, weight, targets, _ = inputs(tokens=0)
    empty, _ = logprobs_from_hidden(hidden, weight[rows], targets, vocab=VOCAB, tensor_group=dist.group.WORLD)
    assert empty.shape == (0,)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_vocabulary_parallel_ranks_equal_one_process(tmp_path):
    mp.spawn(vocabulary_rank, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for vocab, first, second in zip(VOCABULARIES, *ranks, strict=True):
        hidden, weight, targets, coefficients = inputs()
        targets = targets % vocab
        # Every rank finds some of its targets on the other one.
        assert {bool(t < PADDED // 2) for t in targets} == ({True} if vocab <= PADDED // 2 else {True, False})
        expected = with_gradients(
            lambda h, w, targets=targets, vocab=vocab: logprobs_from_hidden(
                h, w, targets, vocab=vocab, temperature=0.7
            ),
            hidden,
            weight,
            coefficients,
        )
        for found in (first, second):
            assert_equal(found[:2], expected[:2])
        # Each rank has its part of the sum over the vocabulary; copy_to_tensor_model_parallel_region adds them up.
        assert_equal(
            (first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]])),
            expected,
        )
