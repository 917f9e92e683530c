"""What is posted for the samples of a prompt, and what answers mean: exact edges, one thing at a time. No server."""

import pytest

from dcpo_megatron.rollout import GenerateRequest, SamplingParams
from dcpo_megatron.rollout.protocol import Generation
from dcpo_megatron.rollout.server_answers import (
    BadAnswer,
    Batch,
    Failed,
    ForeignWeights,
    Refused,
    body,
    joined,
    read,
    refusal_or_failure,
)
from tests.rollout.stand_in_server import finished

VERSIONS = {"run-3": 3, "run-4": 4}


def spans(*found: tuple[str, int, int], tokens: int = 4) -> dict:
    event = finished(0, list(range(tokens)), "run-3")
    event["meta_info"]["weight_versions"] = [{"version": tag, "start": start, "end": end} for tag, start, end in found]
    return event


def test_a_response_and_its_continuation_keep_every_list_in_order():
    whole = joined(Generation([1, 2], [-0.1, -0.2], "abort", [3, 3]), Generation([5, 6], [-0.5, -0.6], "stop", [4, 4]))
    assert whole == Generation([1, 2, 5, 6], [-0.1, -0.2, -0.5, -0.6], "stop", [3, 3, 4, 4])


def test_versions_of_tokens_have_neither_gap_nor_overlap_and_cover_all():
    _, found = read(spans(("run-3", 0, 1), ("run-4", 1, 4)), VERSIONS.get, 3, True)
    assert found.weight_versions.tolist() == [3, 4, 4, 4]
    for wrong in (
        [("run-3", 0, 1), ("run-4", 2, 4)],
        [("run-3", 1, 4)],
        [("run-3", 0, 2), ("run-4", 1, 3)],
        [("run-3", 0, 3), ("run-4", 3, 2)],
        [("run-3", 0, 3)],
        [("run-3", 0, 5)],
        [],
    ):
        with pytest.raises(BadAnswer, match="weight versions"):
            read(spans(*wrong), VERSIONS.get, 3, True)


def test_the_oldest_version_allowed_is_allowed_and_the_one_before_is_not():
    event = spans(("run-3", 0, 4))
    assert read(event, VERSIONS.get, 3, True)[1].weight_versions.tolist() == [3] * 4
    with pytest.raises(ForeignWeights, match="version 3; 4 is the oldest"):
        read(event, VERSIONS.get, 4, True)


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), "-0.5"])
def test_log_probs_are_finite_numbers(value):
    event = finished(0, [7, 8], "run-3")
    event["meta_info"]["output_token_logprobs"][1][0] = value
    with pytest.raises(BadAnswer, match="log-probs"):
        read(event, VERSIONS.get, 3, True)


@pytest.mark.parametrize("token", [2.5, True, 2**31])
def test_tokens_are_token_ids(token):
    event = finished(0, [7, token], "run-3")
    with pytest.raises(BadAnswer, match="token"):
        read(event, VERSIONS.get, 3, True)


def test_what_is_posted_is_what_is_left_of_each_sample_with_seeds_that_a_server_can_read():
    requests = [GenerateRequest((1, 2), seed) for seed in (5, 2**63 + 9)]
    begun = {1: Generation([7, 8], [-0.1, -0.1], "abort", [3, 3])}
    sampling = SamplingParams(6, temperature=0.7, top_p=0.9, stop_token_ids=(11, 12))
    posted = body(Batch((1, 2), (0, 1)), requests, sampling, begun, ["a", "b"])
    assert posted["input_ids"] == [[1, 2], [1, 2, 7, 8]]
    first, second = posted["sampling_params"]
    assert (first["max_new_tokens"], second["max_new_tokens"]) == (6, 4)
    assert (first["sampling_seed"], second["sampling_seed"]) == (5, 9)  # 63 bits
    assert (first["temperature"], first["top_p"], first["top_k"]) == (0.7, 0.9, -1)
    assert first["stop_token_ids"] == [11, 12] and first["ignore_eos"] is False
    # Without any, nothing but the length ends a response.
    (other,) = body(Batch((1, 2), (0,)), requests, SamplingParams(6, top_k=3), {}, ["a"])["sampling_params"]
    assert other["top_k"] == 3 and other["ignore_eos"] is True


def test_statuses_below_500_are_the_requests_fault_and_all_others_the_servers():
    for status, kind in ((400, Refused), (499, Refused), (500, Failed), (503, Failed), (302, Failed), (None, Failed)):
        assert isinstance(refusal_or_failure("why", status), kind)
        assert isinstance(refusal_or_failure({"message": "why", "code": status}, 200), kind if status else Failed)
