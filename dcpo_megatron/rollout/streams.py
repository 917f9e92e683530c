"""Which rank samples which response, and each response's own random stream."""

import hashlib


def share(jobs: list, rank: int, world: int) -> list:
    """The contiguous slice of ``jobs`` that ``rank`` of ``world`` does; sizes differ by one at most."""
    return jobs[len(jobs) * rank // world : len(jobs) * (rank + 1) // world]


def stream_seed(seed: int, step: int, round_number: int, prompt_id: str, sample: int) -> int:
    """The random stream of one response: a hash, so that it depends on nothing but what it is for. 63 bits."""
    text = f"{seed}/{step}/{round_number}/{prompt_id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
