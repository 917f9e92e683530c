"""Cuts a walk over all weights into buckets that are small enough to hold and large enough to be worth a request.

    q k v | o gate up | down ... | embedding     each "|" where the next tensor would make the bucket larger than the
                                                 limit

A bucket is complete, with the collectives that gathered it, before anything of it is sent. A tensor larger than the
limit is a bucket of its own, so a bucket holds ``max(limit, largest tensor)`` bytes at most, and a rank its model
shard, one bucket and the tensor that opens the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Bucket:
    """Tensors on their way: ``tensors`` [(Hugging Face name, contiguous tensor)] and their ``bytes``."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    bytes: int = 0

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.tensors]

    @property
    def dtypes(self) -> list[str]:
        return [str(tensor.dtype).removeprefix("torch.") for _, tensor in self.tensors]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(tensor.shape) for _, tensor in self.tensors]


def buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], limit: int, dtype: torch.dtype | None = None
) -> Iterator[Bucket]:
    """The tensors in their order, in buckets of at most ``limit`` bytes (or one tensor). ``dtype``: what they are cast
    to; None: nothing is cast.

    Raises:
        ValueError: ``limit`` below 1.
    """
    if limit < 1:
        raise ValueError(f"bucket_bytes={limit} must be at least 1")
    bucket = Bucket()
    for name, tensor in tensors:
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        if bucket.tensors and bucket.bytes + tensor.nbytes > limit:
            yield bucket
            # The caller may have dropped its own reference: the tensors must not live on in this frame while the next
            # bucket is gathered.
            bucket = Bucket()
        bucket.tensors.append((name, tensor))
        bucket.bytes += tensor.nbytes
    if bucket.tensors:
        yield bucket
