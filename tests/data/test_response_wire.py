"""A response comes back equal from the wire, and one that does not fit together is refused."""

import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from dcpo_megatron.data import DataError, Response, decode_responses, encode_responses

_finite = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_token = st.tuples(st.integers(0, 2**31 - 1), st.floats(max_value=0, width=32, allow_nan=False), st.integers(0, 2**40))

_text = st.text(alphabet='aB 1é漢\x00\n"\\\ud800', max_size=12)


@st.composite
def _responses(draw):
    tokens = draw(st.lists(_token, max_size=8))
    return Response(
        prompt_id=draw(_text.filter(bool)),
        prompt_token_ids=draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)),
        ground_truth=draw(_text),
        sample_index=draw(st.integers(0, 100)),
        token_ids=[token for token, _, _ in tokens],
        rollout_logprobs=[logprob for _, logprob, _ in tokens],
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        weight_versions=[version for _, _, version in tokens],
        text=draw(_text),
        data_source=draw(_text),
        reward=draw(_finite),
        raw_reward=draw(_finite),
        advantage=draw(_finite),
        correct=draw(st.sampled_from([None, True, False])),
    )


def _response(**changes):
    response = Response("p", [1, 2], "4", 0, [3, 4], [-0.5, -0.1], "stop", [7, 8])
    return replace(response, **changes)


@settings(deadline=None)
@given(st.lists(_responses(), max_size=5))
def test_every_field_comes_back_equal(responses):
    assert decode_responses(encode_responses(responses)) == responses


def test_every_field_is_carried():
    full = _response(text="t", data_source="d", reward=1.0, raw_reward=0.5, advantage=-0.25, correct=True)
    empty = Response("q", [1], "", 0, [], [], "abort", [])
    for field in fields(Response):
        assert str(getattr(full, field.name)) != str(getattr(empty, field.name)) or field.name == "sample_index"
    assert decode_responses(encode_responses([full, empty, full])) == [full, empty, full]


def test_log_probs_have_the_precision_of_the_wire_from_the_start():
    response = _response()
    kept = float(response.rollout_logprobs[1])
    assert kept != -0.1 and math.isclose(kept, -0.1, rel_tol=1e-7)
    assert _response(rollout_logprobs=[-math.inf, 0.0]).rollout_logprobs.tolist() == [-math.inf, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_id": ""}, "response 0 has no prompt id"),
        ({"prompt_token_ids": []}, "response 0 to prompt 'p' has an empty prompt"),
        ({"token_ids": [1]}, "has 1 tokens, 2 log-probs and 2 weight versions"),
        ({"rollout_logprobs": [0.0] * 3}, "has 2 tokens, 3 log-probs and 2 weight versions"),
        ({"weight_versions": []}, "has 2 tokens, 2 log-probs and 0 weight versions"),
        ({"finish_reason": "eos"}, "has finish reason 'eos'"),
        ({"sample_index": -1}, "negative sample index"),
        ({"rollout_logprobs": [0.0, math.nan]}, "log-prob that is not a number"),
        ({"reward": math.nan}, "has reward nan"),
        ({"advantage": math.inf}, "has advantage inf"),
    ],
)
def test_a_response_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        _response(**changes)


def test_a_response_that_was_broken_later_is_not_sent():
    response = _response()
    response.token_ids = np.append(response.token_ids, 5)
    with pytest.raises(DataError, match="has 3 tokens"):
        encode_responses([response])


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1, 2]), encode_responses([_response()])[:-3]])
def test_bytes_that_are_not_responses_are_refused(data):
    with pytest.raises(DataError, match="are not encoded responses"):
        decode_responses(data)


@pytest.mark.parametrize("lengths", [[-1, 5], [3, 0], [0, 3]])
def test_lengths_that_do_not_cut_the_tokens_are_refused(lengths):
    # Each of 2 tokens; -1 and 5 add up to the 4 that there are.
    tensors = load(encode_responses([_response(), _response()]))
    tensors["lengths"] = torch.tensor(lengths)
    with pytest.raises(DataError, match="are not encoded responses"):
        decode_responses(save(tensors))


@pytest.mark.parametrize("token", [2**32 + 5, 3.7])
def test_a_token_id_that_is_none_is_refused(token):
    with pytest.raises(DataError, match="token_ids of Response holds values that are no int32"):
        _response(token_ids=np.array([3, token]))
