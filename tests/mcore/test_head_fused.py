"""The fused head-and-loss against the recomputing head and a dense log_softmax: gradients, metrics, and the real
schedule."""

import dataclasses

import pytest
import torch

from dcpo_megatron.mcore.batch import TrainingSample, make_micro_batch
from dcpo_megatron.mcore.head.response_head import logprobs_from_hidden, loss_from_hidden
from dcpo_megatron.mcore.loss import make_loss
from dcpo_megatron.objectives import PRESETS, get_preset
from tests.mcore.head_jobs import dense, relative

HIDDEN, VOCAB, PADDED = 6, 29, 32
TOKEN_LEVEL = {name: objective for name, objective in PRESETS.items() if objective.ratio_level == "token"} | {
    "cispo": dataclasses.replace(get_preset("grpo"), out_of_bound="cispo"),
    "dcpo, kl, entropy, tis": dataclasses.replace(
        get_preset("dcpo-paper"), kl_coef=0.3, entropy_coef=0.2, correction="tis"
    ),
    "grpo, entropy alone": dataclasses.replace(get_preset("grpo"), entropy_coef=0.5),
}


def case(dtype=torch.float32, seed=0):
    """A micro-batch of three responses whose old log-probs cross every bound, with hidden states and weight."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for number, (length, advantage) in enumerate([(5, 1.5), (9, -1.0), (1, 0.0)]):
        tokens = torch.randint(VOCAB, (length + 2,), generator=generator).tolist()
        old = [-torch.rand(length, generator=generator) * 6 for _ in range(3)]
        sequences.append(TrainingSample(number, tokens[:2], tokens[2:], advantage, 0.1 / length, *old))
    batch = make_micro_batch(sequences, torch.device("cpu"))
    hidden = torch.randn(len(batch.targets), HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    return batch, hidden, weight


def run(batch, hidden, weight, objective, *, fused, incoming=1.0, chunk_tokens=4):
    """(loss, metrics, hidden.grad, weight.grad) of one micro-batch, as the schedule would have them with the gradient
    ``incoming``."""
    hidden, weight = (t.clone().requires_grad_() for t in (hidden, weight))
    loss_function = make_loss(batch, objective, num_microbatches=3, data_parallel_size=2, fused=fused)
    settings = dict(vocab=VOCAB, temperature=0.8, chunk_tokens=chunk_tokens)
    if fused:
        loss, logprobs, entropy = loss_from_hidden(hidden, weight, batch.targets, loss_function.token_loss, **settings)
        last = torch.stack((loss, torch.zeros_like(loss)))[None]
        output = torch.cat((torch.stack((logprobs, entropy), dim=-1), last))
    else:
        output = torch.stack(logprobs_from_hidden(hidden, weight, batch.targets, **settings), dim=-1)
    scaled, metrics = loss_function(output)
    (scaled * incoming).backward()
    return scaled.detach(), metrics, hidden.grad, weight.grad


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_the_fused_gradients_and_metrics_equal_the_recomputed_ones(name, chunk_tokens):
    batch, hidden, weight = case()
    runs = [
        run(batch, hidden, weight, TOKEN_LEVEL[name], fused=fused, incoming=0.37, chunk_tokens=chunk_tokens)
        for fused in (True, False)
    ]
    (loss, metrics, *gradients), (expected_loss, expected_metrics, *expected) = runs
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
    for kind in ("sums", "maxima"):
        torch.testing.assert_close(metrics[kind], expected_metrics[kind], rtol=1e-6, atol=1e-9)
    for found, other in zip(gradients, expected, strict=True):
        assert other.abs().max() > 1e-3  # else equality would say nothing
        assert relative(found, other) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_fused_gradients_equal_the_full_paths(dtype, limit):
    batch, hidden, weight = case(dtype)
    objective = TOKEN_LEVEL["dcpo, kl, entropy, tis"]
    _, _, *found = run(batch, hidden, weight, objective, fused=True)
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    output = torch.stack(dense(*leaves, batch.targets, VOCAB, 0.8), dim=-1)
    make_loss(batch, objective, num_microbatches=3, data_parallel_size=2)(output)[0].backward()
    for ours, leaf in zip(found, leaves, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, leaf.grad) < limit


def test_rows_of_padding_get_no_gradient_and_change_nothing():
    batch, hidden, weight = case()
    runs = []
    for scale in (1.0, 1e4):
        changed = weight.clone()
        changed[VOCAB:] *= scale
        runs.append(run(batch, hidden, changed, TOKEN_LEVEL["dcpo, kl, entropy, tis"], fused=True))
    for (loss, metrics, *gradients), (other_loss, other_metrics, *others) in [runs]:
        assert torch.equal(loss, other_loss)
        assert torch.equal(metrics["sums"], other_metrics["sums"])
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
        assert not gradients[1][VOCAB:].any()


def test_a_micro_batch_without_responses_gives_zero_gradients():
    batch = make_micro_batch([], torch.device("cpu"))
    _, _, weight = case()
    loss, metrics, grad_hidden, grad_weight = run(
        batch, torch.zeros(0, HIDDEN), weight, get_preset("dcpo-paper"), fused=True
    )
    assert loss == 0 and not metrics["sums"].any()
    assert grad_hidden.shape == (0, HIDDEN) and not grad_weight.any()


def test_a_weight_that_needs_no_gradient_gets_none_and_changes_nothing_for_the_hidden_states():
    batch, hidden, weight = case()
    objective = get_preset("dcpo-paper")
    _, _, expected, _ = run(batch, hidden, weight, objective, fused=True)
    leaf = hidden.clone().requires_grad_()
    function = make_loss(batch, objective, num_microbatches=3, data_parallel_size=2, fused=True)
    loss, _, _ = loss_from_hidden(
        leaf, weight, batch.targets, function.token_loss, vocab=VOCAB, temperature=0.8, chunk_tokens=4
    )
    (loss * 6).backward()
    assert relative(leaf.grad, expected) < 1e-6


def test_the_stored_gradients_are_spent_once():
    batch, hidden, weight = case()
    function = make_loss(batch, "grpo", num_microbatches=1, data_parallel_size=1, fused=True)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss, _, _ = loss_from_hidden(*leaves, batch.targets, function.token_loss, vocab=VOCAB)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_ratio_of_the_whole_response_refuses_to_be_fused():
    batch, _, _ = case()
    with pytest.raises(ValueError, match="ratio_level='sequence' cannot be fused"):
        make_loss(batch, "gspo", num_microbatches=1, data_parallel_size=1, fused=True)


def test_the_fused_head_is_taken_by_itself_only_where_it_holds_little():
    from dcpo_megatron.mcore.head.backend import FUSED_HELD_BYTES, held_by_fused_head

    assert held_by_fused_head(152064, 3584, "float32") == 0
    assert held_by_fused_head(152064, 3584, "bfloat16") > FUSED_HELD_BYTES  # 2.03 GiB
    assert held_by_fused_head(152064 // 2, 3584, "bfloat16") > FUSED_HELD_BYTES
    assert held_by_fused_head(152064 // 4, 3584, "bfloat16") <= FUSED_HELD_BYTES
    assert held_by_fused_head(152064, 1536, "bfloat16") <= FUSED_HELD_BYTES
