"""One response on its way through a step, and its form on the wire.

A ``Response`` is made by the rollout and then grows: the text is decoded, the reward and whether it is right are
judged, the advantage is computed. What it has of each token are arrays. ``encode_responses`` packs a list of them into
bytes for a file: token data as flat safetensors tensors with lengths, strings as JSON. Nothing in it can run code,
unlike pickle.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dcpo_megatron.data.errors import DataError

FINISH_REASONS = ("stop", "length", "abort")
_WIRE_VERSION = 1
_STRINGS = ("prompt_id", "ground_truth", "finish_reason", "text", "data_source")
_NUMBERS = ("reward", "raw_reward", "advantage")  # float or None; NaN on the wire is None


class ArrayRecord:
    """Of a dataclass (``eq=False``) with arrays, ``DTYPES`` by field: they are taken as they are where the type is
    right, anything else is converted; two records are equal where all fields are, arrays by value."""

    DTYPES: ClassVar[dict[str, type]]

    def __post_init__(self) -> None:
        for name, dtype in self.DTYPES.items():
            given = np.asarray(getattr(self, name))
            array: np.ndarray = given.astype(dtype, copy=False)
            if array is not given and np.issubdtype(dtype, np.integer) and (array != given).any():
                raise DataError(f"{name} of {type(self).__name__} holds values that are no {np.dtype(dtype).name}")
            setattr(self, name, array)

    def __eq__(self, other) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]  # a dataclass
        pairs = ((getattr(self, name), getattr(other, name)) for name in names)
        return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


@dataclass(eq=False)
class Response(ArrayRecord):
    """One sampled response. ``T`` = its number of tokens, at least 0 (an aborted one may have none).

    ``prompt_token_ids``, ``token_ids`` [T]: int32. ``sample_index``: 0..G-1 within the prompt. ``rollout_logprobs``
    [T]: fp32, natural logs by the engine. ``weight_versions`` [T]: int64, the version that sampled each token; it never
    falls within a response. ``finish_reason``: "stop", "length" (cut at the limit) or "abort". ``raw_reward``: the
    reward before any shaping (None: not shaped). ``correct``: whether the raw reward means a right answer.

    Raises DataError if lengths disagree or a value is out of range.
    """

    # Of what there is for each token, of the prompt or of the response.
    DTYPES = {
        "prompt_token_ids": np.int32,
        "token_ids": np.int32,
        "rollout_logprobs": np.float32,
        "weight_versions": np.int64,
    }
    prompt_id: str
    prompt_token_ids: np.ndarray
    ground_truth: str
    sample_index: int
    token_ids: np.ndarray
    rollout_logprobs: np.ndarray
    finish_reason: str
    weight_versions: np.ndarray
    text: str = ""
    data_source: str = ""
    reward: float | None = None
    raw_reward: float | None = None
    advantage: float | None = None
    correct: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Raises DataError if the fields do not fit together; also called when responses are encoded."""
        name = f"response {self.sample_index} to prompt {self.prompt_id!r}"
        if not self.prompt_id:
            raise DataError(f"response {self.sample_index} has no prompt id: every prompt needs one that never changes")
        if not len(self.prompt_token_ids):
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
        if np.isnan(self.rollout_logprobs).any():
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
        "lengths": _integers(len(response.token_ids) for response in responses),
        "numbers": torch.tensor(numbers, dtype=torch.float64).reshape(len(responses), len(_NUMBERS)),
        "correct": torch.tensor([-1 if r.correct is None else int(r.correct) for r in responses], dtype=torch.int8),
    } | {
        name: torch.from_numpy(np.concatenate([np.empty(0, dtype), *(getattr(r, name) for r in responses)]))
        for name, dtype in Response.DTYPES.items()
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
        for name in Response.DTYPES:
            lengths = tensors["prompt_lengths" if name == "prompt_token_ids" else "lengths"]
            columns[name] = _split(tensors[name].numpy(), lengths.numpy())
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


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if min(lengths, default=0) < 0 or lengths.sum() != len(flat):
        raise ValueError(f"the lengths do not cut {len(flat)} values")
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
