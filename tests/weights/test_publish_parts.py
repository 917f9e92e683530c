"""The pure parts of publishing: buckets, and what checksums and log-probs prove."""

import pytest
import torch

from dcpo_megatron.rollout import RolloutError
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.weights.publish import PublishOptions, server_session, transaction, weight_checks
from dcpo_megatron.weights.publish.buckets import buckets
from dcpo_megatron.weights.publish.options import PublishResult


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
    assert weight_checks.odd_ones({"x": good, "y": bad, "z": good}) == {"y": "its 0.b is not that of the other servers"}
    # Servers of another layout hold other tensors: nothing to compare.
    assert weight_checks.odd_ones({"x": good, "w": {"0.a": "7", "1.a": "8"}}) == {}


def test_a_tensor_that_is_still_noise_is_named():
    weight_checks.check_arrived({"0.a": "1"}, {"0.a": "2"})
    with pytest.raises(RolloutError, match=r"1 tensors .* such as model\.norm\.weight"):
        weight_checks.check_arrived({"0.a": "1", "0.model.norm.weight": "5"}, {"0.a": "2", "0.model.norm.weight": "5"})


def test_log_probs_that_are_not_a_number_are_no_match():
    weight_checks.check_logprobs(1e-5, 1e-3)
    for difference in (0.1, float("nan")):
        with pytest.raises(RolloutError, match=r"publish\.tolerance"):
            weight_checks.check_logprobs(difference, 1e-3)


@pytest.mark.parametrize("wrong", [{"mode": "smoke"}, {"pause": "later"}, {"mode": "disk"}, {"bucket_bytes": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        PublishOptions(**wrong)


def test_a_server_releases_and_takes_back_every_kind_of_memory_that_it_knows():
    """Weights, cache and captured graphs: without tags SGLang takes all that its version has."""
    asked = []

    class Recorder:
        """Stands for a server: notes what it is asked."""

        def weight_version(self):
            return "run-3"

        def post(self, path, body, timeout):
            asked.append((path, body))

    server_session.release_memory(Recorder(), 1.0)
    server_session.resume_memory(Recorder(), 1.0)
    assert asked == [
        ("/release_memory_occupation", {}),
        ("/update_weight_version", {"new_version": "run-3.released", "abort_all_requests": False}),
        ("/resume_memory_occupation", {}),
    ]


def test_room_is_made_after_the_probe_and_before_any_server_is_spoken_to(monkeypatch):
    """The probe is a forward pass: what it leaves in the allocator's cache would be missing to a server on the same
    GPU."""
    order = []

    class Probe:
        def sequences(self):
            return [[1, 2]]

        def logprobs(self):
            order.append("probe")
            return [[-1.0]]

    monkeypatch.setattr(
        transaction._Publication, "run", lambda self, walk: order.append("servers") or PublishResult(self.version)
    )
    publisher = transaction.WeightPublisher(
        Fleet([Server("http://127.0.0.1:9")], "run"), PublishOptions(), device=torch.device("cpu"), probe=Probe(),
        make_room=lambda: order.append("room"),
    )  # fmt: skip
    publisher.publish([], 1)
    assert order == ["probe", "room", "servers"]
