"""The pure parts of publishing: buckets, and what checksums and log-probs prove."""

import pytest
import torch

from dcpo_megatron.rollout import RolloutError
from dcpo_megatron.weights.publish import PublishOptions, verify
from dcpo_megatron.weights.publish.buckets import buckets


def walk(*sizes: int):
    return [(f"t{number}", torch.full((size,), float(number))) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("limit", [1, 16, 40, 1000])
def test_buckets_keep_order_and_content_within_the_limit_or_the_largest_tensor(limit):
    tensors = walk(1, 2, 10, 1, 1, 3, 0, 9)
    cut = list(buckets(iter(tensors), limit))
    flat = [item for bucket in cut for item in bucket.tensors]
    assert [name for name, _ in flat] == [name for name, _ in tensors]
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(flat, tensors, strict=True))
    for bucket in cut:
        assert bucket.bytes == sum(tensor.nbytes for _, tensor in bucket.tensors)
        assert bucket.bytes <= limit or sum(tensor.nbytes > 0 for _, tensor in bucket.tensors) == 1


def test_a_bucket_is_handed_on_before_the_one_after_the_next_is_gathered():
    gathered = []

    def tensors():
        for name, tensor in walk(4, 4, 4, 4):
            gathered.append(name)
            yield name, tensor

    cut = buckets(tensors(), 16)
    next(cut)
    assert gathered == ["t0", "t1"]


def test_tensors_are_cast_and_made_contiguous():
    (bucket,) = buckets([("w", torch.arange(6.0).view(2, 3).t())], 100, torch.bfloat16)
    assert bucket.bytes == 12 and bucket.dtypes == ["bfloat16"] and bucket.shapes == [[3, 2]]
    assert bucket.tensors[0][1].is_contiguous()


def test_the_server_that_differs_from_the_majority_is_named_with_the_tensor():
    good, bad = {"0.a": "1", "0.b": "2"}, {"0.a": "1", "0.b": "3"}
    assert verify.odd_ones({"x": good, "y": bad, "z": good}) == {"y": "its 0.b is not that of the other servers"}
    # Servers of another layout hold other tensors: nothing to compare.
    assert verify.odd_ones({"x": good, "w": {"0.a": "7", "1.a": "8"}}) == {}


def test_a_tensor_that_is_still_noise_is_named():
    verify.check_arrived({"0.a": "1"}, {"0.a": "2"})
    with pytest.raises(RolloutError, match=r"1 tensors .* such as model\.norm\.weight"):
        verify.check_arrived({"0.a": "1", "0.model.norm.weight": "5"}, {"0.a": "2", "0.model.norm.weight": "5"})


def test_log_probs_that_are_not_a_number_are_no_match():
    verify.check_logprobs(1e-5, 1e-3)
    for difference in (0.1, float("nan")):
        with pytest.raises(RolloutError, match=r"publish\.tolerance"):
            verify.check_logprobs(difference, 1e-3)


@pytest.mark.parametrize("wrong", [{"mode": "smoke"}, {"pause": "later"}, {"mode": "disk"}, {"bucket_bytes": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        PublishOptions(**wrong)
