"""One response on its way through a step, and its form on the wire.

A ``Response`` is made by the rollout and then grows: the text is decoded, the reward and whether it is right are
judged, the advantage is computed. ``encode_responses`` packs a list of them into bytes for a gather over ranks: token
data as flat safetensors tensors with lengths, strings as JSON. Nothing in it can run code, unlike pickle.
"""

import array
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dcpo_megatron.data.errors import DataError

FINISH_REASONS = ("stop", "length", "abort")
_WIRE_VERSION = 1
_STRINGS = ("prompt_id", "ground_truth", "finish_reason", "text", "data_source")
_NUMBERS = ("reward", "raw_reward", "advantage")  # float or None; NaN on the wire is None


@dataclass
class Response:
    """One sampled response. ``T`` = its number of tokens, at least 0 (an aborted one may have none).

    ``sample_index``: 0..G-1 within the prompt. ``rollout_logprobs`` [T]: natural logs by the engine; kept to the
    precision of fp32, so that what is computed here and after the wire agrees. ``weight_versions`` [T]: the version
    that sampled each token. ``finish_reason``: "stop", "length" (cut at the limit) or "abort". ``raw_reward``: the
    reward before any shaping (None: not shaped). ``correct``: whether the raw reward means a right answer.

    Raises DataError if lengths disagree or a value is out of range.
    """

    prompt_id: str
    prompt_token_ids: list[int]
    ground_truth: str
    sample_index: int
    token_ids: list[int]
    rollout_logprobs: list[float]
    finish_reason: str
    weight_versions: list[int]
    text: str = ""
    data_source: str = ""
    reward: float | None = None
    raw_reward: float | None = None
    advantage: float | None = None
    correct: bool | None = None

    def __post_init__(self) -> None:
        self.rollout_logprobs = array.array("f", self.rollout_logprobs).tolist()
        self.validate()

    def validate(self) -> None:
        """Raises DataError if the fields do not fit together; also called when responses are encoded."""
        name = f"response {self.sample_index} to prompt {self.prompt_id!r}"
        if not self.prompt_id:
            raise DataError(f"response {self.sample_index} has no prompt id: every prompt needs one that never changes")
        if not self.prompt_token_ids:
            raise DataError(f"{name} has an empty prompt: a response needs at least one prompt token")
        if not len(self.token_ids) == len(self.rollout_logprobs) == len(self.weight_versions):
            raise DataError(
                f"{name} has {len(self.token_ids)} tokens, {len(self.rollout_logprobs)} log-probs and "
                f"{len(self.weight_versions)} weight versions: there must be one of each for every token"
            )
        if self.finish_reason not in FINISH_REASONS:
            raise DataError(f"{name} has finish reason {self.finish_reason!r}: it must be one of {FINISH_REASONS}")
        if self.sample_index < 0:
            raise DataError(f"{name} has a negative sample index: it counts from 0 within the prompt")
        # The sum is NaN where a term is, and is quick to have; infinities of both signs make it so too.
        if math.isnan(sum(self.rollout_logprobs)) and any(map(math.isnan, self.rollout_logprobs)):
            raise DataError(f"{name} has a log-prob that is not a number: the engine's logits are broken")
        for field in _NUMBERS:
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise DataError(f"{name} has {field} {value}: it must be finite, or None while it is unknown")


def encode_responses(responses: Sequence[Response]) -> bytes:
    """The responses as bytes for ``decode_responses``; every field comes back equal. Raises DataError as
    ``validate``."""
    for response in responses:
        response.validate()
    strings = {name: [getattr(response, name) for response in responses] for name in _STRINGS}
    text = json.dumps({"version": _WIRE_VERSION, **strings}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    numbers = [[_or_nan(getattr(response, name)) for name in _NUMBERS] for response in responses]
    return save({
        "strings": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "sample_index": _integers(response.sample_index for response in responses),
        "prompt_lengths": _integers(len(response.prompt_token_ids) for response in responses),
        "prompt_token_ids": _integers(chain.from_iterable(response.prompt_token_ids for response in responses)),
        "lengths": _integers(len(response.token_ids) for response in responses),
        "token_ids": _integers(chain.from_iterable(response.token_ids for response in responses)),
        "weight_versions": _integers(chain.from_iterable(response.weight_versions for response in responses)),
        "rollout_logprobs": torch.from_numpy(
            np.fromiter(chain.from_iterable(response.rollout_logprobs for response in responses), dtype=np.float32)
        ),
        "numbers": torch.tensor(numbers, dtype=torch.float64).reshape(len(responses), len(_NUMBERS)),
        "correct": torch.tensor([-1 if r.correct is None else int(r.correct) for r in responses], dtype=torch.int8),
    })  # fmt: skip


def decode_responses(data: bytes) -> list[Response]:
    """The responses that ``encode_responses`` packed. Raises DataError if the bytes are anything else."""
    try:
        tensors = load(data)
        strings = json.loads(tensors["strings"].numpy().tobytes().decode("utf-8", "surrogatepass"))
        if strings["version"] != _WIRE_VERSION:
            raise DataError(
                f"these responses have wire version {strings['version']}, and this program reads {_WIRE_VERSION}: "
                f"run the same version of the program on every rank"
            )
        columns = {name: strings[name] for name in _STRINGS}
        columns["sample_index"] = tensors["sample_index"].tolist()
        columns["prompt_token_ids"] = _split(tensors["prompt_token_ids"], tensors["prompt_lengths"])
        for name in ("token_ids", "weight_versions", "rollout_logprobs"):
            columns[name] = _split(tensors[name], tensors["lengths"])
        for index, name in enumerate(_NUMBERS):
            columns[name] = [None if math.isnan(value) else value for value in tensors["numbers"][:, index].tolist()]
        columns["correct"] = [None if value < 0 else bool(value) for value in tensors["correct"].tolist()]
        rows = zip(*columns.values(), strict=True)
        return [Response(**dict(zip(columns, row, strict=True))) for row in rows]
    except DataError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise DataError(
            f"these {len(data)} bytes are not encoded responses ({type(error).__name__}): they may have been cut off"
        ) from error


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _integers(values: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(values, dtype=np.int64))


def _split(flat: torch.Tensor, lengths: torch.Tensor) -> list[list]:
    # One list, cut: thousands of short tensors would cost more than their content.
    values, counts = flat.tolist(), lengths.tolist()
    if min(counts, default=0) < 0 or sum(counts) != len(values):
        raise ValueError(f"the lengths do not cut {len(values)} values")
    return [values[begin:end] for begin, end in pairwise(accumulate(counts, initial=0))]
