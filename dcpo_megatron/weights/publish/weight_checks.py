"""Proof that a server holds the weights that were sent, before any token sampled from them is used.

    scrub       before a server's first weights: all of its own become noise
                -> a tensor that does not arrive stays noise
    checksums   of every tensor on every server (where its version computes them)
                -> a tensor still noise is named; servers of one layout agree bit for bit
    log-probs   of fixed token sequences, training model beside server
                -> the weights are the training model's, used as the training model uses them

Checksums alone cannot say that the weights are the trainer's: a server stores fused and padded tensors of its own, and
on a GPU hashes them with a kernel of its own. So log-probs are compared whenever the training model's are given, and
checksums stand alone only where they are not.
"""

from __future__ import annotations

import math

from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server, ServerError

_CHECKER = "/weights_checker"
Checksums = dict[str, str]
# Mean |log-prob difference| that one set of weights, computed twice, may show, by the dtype of both.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


def scrub(server: Server, seconds: float) -> Checksums | None:
    """Overwrites the server's weights with noise; the checksums of the noise, None where the server cannot compute any.
    Raises ServerError."""
    server.post(_CHECKER, {"action": "reset_tensors"}, timeout=seconds)
    return checksums(server, seconds)


def checksums(server: Server, seconds: float) -> Checksums | None:
    """``{rank.tensor: checksum}`` of everything the server holds; None where its version cannot compute them (0.5.20
    and older without a GPU). Raises ServerError."""
    try:
        answer = server.post(_CHECKER, {"action": "checksum"}, timeout=seconds)
    except ServerError as error:
        if error.status is None:
            raise
        return None
    # By rank, in the server's order: its parallel layout shows in the names.
    found: Checksums = {}
    for number, rank in enumerate(answer.get("ranks") or []):
        found |= {f"{number}.{name}": value for name, value in rank["checksums"].items()}
    return found or None


def check_arrived(noise: Checksums, now: Checksums) -> None:
    """Raises RolloutError naming the server's tensors that are still the noise of :func:`scrub`: nothing that was sent
    is for them."""
    left = sorted(name.split(".", 1)[1] for name, value in now.items() if noise.get(name) == value)
    if left:
        raise RolloutError(
            f"{len(left)} tensors of the server were not among the weights sent, such as {left[0]}: is it serving the"
            " same model? start it from the folder that training started from"
        )


def odd_ones(found: dict[str, Checksums]) -> dict[str, str]:
    """Of ``{address: checksums}``, the servers that differ from the majority of those with the same tensors:
    ``{address: what differs}``."""
    odd: dict[str, str] = {}
    layouts: dict[tuple[str, ...], list[str]] = {}
    for url, sums in found.items():
        layouts.setdefault(tuple(sorted(sums)), []).append(url)
    for names, urls in layouts.items():
        for name in names:
            values = [found[url][name] for url in urls]
            common = max(values, key=values.count)
            for url, value in zip(urls, values, strict=True):
                if value != common:
                    odd.setdefault(url, f"its {name} is not that of the other servers")
    return odd


def logprob_difference(server: Server, sequences: list[list[int]], wanted: list[list[float]], seconds: float) -> float:
    """Mean |training log-prob - server log-prob| over all tokens but each sequence's first. Raises ServerError;
    RolloutError for a number that is not finite."""
    body = {
        "input_ids": sequences, "return_logprob": True, "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
    }  # fmt: skip
    answers = server.post("/generate", body, timeout=seconds)["answer"]
    total, count = 0.0, 0
    for ids, expected, answer in zip(sequences, wanted, answers, strict=True):
        rows = answer["meta_info"]["input_token_logprobs"]
        if [row[1] for row in rows] != ids:
            raise RolloutError("the server answered with log-probs of other tokens than those asked for")
        for want, row in zip(expected, rows[1:], strict=True):
            # A server with NaN weights says null.
            total += abs(want - (math.nan if row[0] is None else row[0]))
            count += 1
    return total / max(1, count)


def check_logprobs(difference: float, tolerance: float) -> None:
    """Raises RolloutError where the server's log-probs are not the training model's."""
    if not difference <= tolerance:
        raise RolloutError(
            f"its log-probs differ from the training model's by {difference:.2g} on average, above"
            f" publish.tolerance={tolerance:g}: is it serving the same model in the same precision? raise"
            " publish.tolerance if the difference is rounding"
        )
