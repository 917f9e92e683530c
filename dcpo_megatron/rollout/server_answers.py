"""What is posted to an SGLang server's ``/generate`` for the samples of one prompt, and what its answers mean. Pure.

posted      one request for the G samples of a prompt: the server finds the shared prefix, and one connection carries
            them all
answered    an event a sample, when it is finished: a server that dies later takes only the unfinished ones with it

{"index": 3, "output_ids": [...], "meta_info": {"output_token_logprobs": [[logprob, token, null], ...],
 "finish_reason": {"type": "stop" | "length" | "abort"}, "weight_versions": [{"version": tag, "start": 0, "end": 9},
 ...]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcpo_megatron.rollout.protocol import GenerateRequest, Generation, SamplingParams

# Tokens between two events of a sample: more than any response has, so that a sample is sent once, whole (and once with
# its first token).
_ONE_EVENT = 2**31 - 1
_DATA = "data:"
_NONE = np.empty(0)


class BadAnswer(Exception):
    """A server answered something that no healthy SGLang server answers."""


class ForeignWeights(Exception):
    """Tokens were sampled from weights that are not this run's, or older than allowed."""


class Unsure(Exception):
    """Nothing says which weights some of the tokens are from; the server may be as healthy as any."""


class Refused(Exception):
    """The server will not do this, at another time or place neither."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Failed(Exception):
    """The server could not do this now."""


@dataclass(frozen=True)
class Batch:
    """Samples of one prompt that are posted together. ``places``: their positions among the caller's requests;
    ``attempts``: how often they were posted in vain."""

    prompt_token_ids: tuple[int, ...]
    places: tuple[int, ...]
    attempts: int = 0


def batches_of(requests: Sequence[GenerateRequest], together: bool = True) -> list[Batch]:
    """One batch a distinct prompt, in the order in which the prompts come; one a request where they must not be posted
    ``together``."""
    if not together:
        return [Batch(request.prompt_token_ids, (place,)) for place, request in enumerate(requests)]
    places: dict[tuple[int, ...], list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(request.prompt_token_ids, []).append(place)
    return [Batch(prompt, tuple(found)) for prompt, found in places.items()]


def body(
    batch: Batch,
    requests: Sequence[GenerateRequest],
    sampling: SamplingParams,
    begun: Mapping[int, Generation],
    rids: Sequence[str],
    together: bool = True,
) -> dict:
    """The JSON for ``/generate``. ``begun``: what is there already of some samples, by place; ``rids`` name the
    samples, for ``/abort_request``. Not ``together``: the form for one sample, the only one that sglang-router
    takes."""
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": list(sampling.stop_token_ids),
        # It would switch stop_token_ids off as well; without any, nothing but the length ends a response.
        "ignore_eos": not sampling.stop_token_ids,
        "stream_interval": _ONE_EVENT,
    }
    tokens = [begun[place].token_ids.tolist() if place in begun else [] for place in batch.places]
    lists: dict[str, list[Any]] = {
        "rid": list(rids),
        "input_ids": [[*batch.prompt_token_ids, *known] for known in tokens],
        # SGLang draws by seed and position in the text: a response that goes on later goes on with the same draws.
        "sampling_params": [
            common
            | {
                "max_new_tokens": sampling.max_new_tokens - len(known),
                "sampling_seed": requests[place].seed % 2**63,
            }
            for place, known in zip(batch.places, tokens, strict=True)
        ],
    }
    fields = lists if together else {name: values[0] for name, values in lists.items()}
    return fields | {"return_logprob": True, "stream": True}


def event_of(line: str) -> dict | None:
    """The event in a line of the answer; None for a line without one.

    Raises:
        Refused: the server says that the request is wrong.
        Failed: the server says that it could not.
        BadAnswer: not what SGLang sends.
    """
    if not line.startswith(_DATA):
        return None
    text = line[len(_DATA) :].strip()
    if text == "[DONE]":
        return None
    try:
        event = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadAnswer(f"an event that is not JSON ({error}): {text[:80]!r}") from None
    if not isinstance(event, dict):
        raise BadAnswer(f"an event that is not a JSON object: {text[:80]!r}")
    if "error" in event:
        raise refusal_or_failure(event["error"])
    return event


def refusal_or_failure(error: object, status: int | None = None) -> Exception:
    """What an error answer means: statuses below 500 are the request's fault, all others the server's."""
    if isinstance(error, dict):
        status = error.get("code", status)
        error = error.get("message", error)
    text = " ".join(str(error).split())[:500]
    if isinstance(status, int) and 400 <= status < 500:
        return Refused(text, status)
    return Failed(f"status {status}: {text}")


def tags(event: dict) -> list[str]:
    """The tags of the weights that an event's tokens are from; empty for a response under way."""
    return [tag for tag, _, _ in _spans(event)] if _ended(event) else []


def read(
    event: dict, version_of: Callable[[str], int | None], oldest: int, constant: bool
) -> tuple[int, Generation | None]:
    """Which sample of the batch this event is of, and what ended it: "stop", "length", or "abort" before its time. None
    for one under way.

    Args:
        version_of: tag -> version, None where the weights are not ours.
        oldest: the oldest version allowed.
        constant: the weights have not changed since the request was posted, as far as we know.

    Raises:
        ForeignWeights, Unsure, BadAnswer: see there.
    """
    if not _ended(event):
        return event.get("index", 0), None
    try:
        # An answer to the form for one sample has no index.
        index, tokens, meta = event.get("index", 0), event["output_ids"], event["meta_info"]
        reason = meta["finish_reason"]["type"]
        pairs = meta.get("output_token_logprobs") or []
        logprobs, ids = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer(f"a response without {error}") from None
    if reason == "abort" and not tokens:
        return index, Generation(_NONE, _NONE, "abort", _NONE)
    whole = all(type(token) is int for token in tokens)
    finite = all(isinstance(value, float | int) and math.isfinite(value) for value in logprobs)
    if not (tokens and ids == tokens and whole and finite):
        raise BadAnswer(f"a response of {len(tokens)} tokens with {len(logprobs)} log-probs that do not belong to them")
    if "weight_versions" not in meta and not constant:
        raise Unsure(
            "weights changed while it sampled, and it (SGLang before 0.5.20) does not tell which token is from which"
        )
    versions, known = np.empty(len(tokens), dtype=np.int64), 0
    for tag, start, end in _spans(event):
        version = version_of(tag)
        if version is None:
            raise ForeignWeights(f"it sampled from weights {tag!r}, which are not this run's")
        if version < oldest:
            raise ForeignWeights(f"it sampled from weights of version {version}; {oldest} is the oldest allowed")
        if start != known or end < start:
            raise BadAnswer(f"weight versions with a gap or an overlap at token {start}")
        versions[start:end], known = version, end
    if known != len(tokens):
        raise BadAnswer(f"weight versions of {known} tokens for a response of {len(tokens)}")
    try:
        token_ids = np.array(tokens, dtype=np.int32)
    except OverflowError as error:  # they are whole numbers
        raise BadAnswer(f"a response with tokens that are no token ids ({error})") from None
    reason = reason if reason in ("stop", "abort") else "length"
    return index, Generation(token_ids, np.array(logprobs, dtype=np.float32), reason, versions)


def joined(begun: Generation | None, more: Generation) -> Generation:
    """A response and its continuation."""
    if begun is None:
        return more
    return Generation(
        np.concatenate([begun.token_ids, more.token_ids]),
        np.concatenate([begun.logprobs, more.logprobs]),
        more.finish_reason,
        np.concatenate([begun.weight_versions, more.weight_versions]),
    )


def _ended(event: dict) -> bool:
    try:
        return event["meta_info"]["finish_reason"] is not None
    except (KeyError, TypeError):
        raise BadAnswer("an event without meta_info.finish_reason") from None


def _spans(event: dict) -> list[tuple[str, int, int]]:
    """(tag, first token, behind the last token). Servers without spans have one tag for all."""
    meta = event["meta_info"]
    try:
        if "weight_versions" in meta:
            return [(str(span["version"]), span["start"], span["end"]) for span in meta["weight_versions"]]
        return [(str(meta["weight_version"]), 0, len(event["output_ids"]))]
    except (KeyError, TypeError) as error:
        raise BadAnswer(f"a response without {error}") from None
