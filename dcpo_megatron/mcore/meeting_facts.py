"""What ranks tell one another when they first meet, and what follows from it: who is missing, which interface leads to
the others. No store, nothing that waits for long.

cards         {"host": "h1", "stack": ..., "address": "10.0.0.1", ...} of every rank
--> verdict   {"failed": None, "alone": False, "leaders": [0, 8], "peer": "10.0.0.2"}
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from dcpo_megatron import network

NAMED_HOSTS = 8  # in a sentence


def settle(cards: Sequence[dict]) -> dict:
    """The verdict once all ranks are here: "failed" (a sentence or None), "alone" (all share one loopback), "peer" (an
    address of a host that is not the store's), "leaders" (the first rank of each host)."""
    wrong = dict.fromkeys(sentence for card in cards for sentence in card["wrong"])
    failed = (
        f"the run has not started: {'; '.join(list(wrong)[:NAMED_HOSTS])}: correct it there, or unset it"
        if wrong
        else None
    )
    away = [
        card["address"] for card in cards
        if card["stack"] != cards[0]["stack"] and card["address"] and not network.is_loopback(card["address"])
    ]  # fmt: skip
    stacks = {card["stack"]: rank for rank, card in reversed(list(enumerate(cards)))}
    return {
        "leaders": sorted(stacks.values()),
        "failed": failed,
        "alone": len(stacks) == 1,
        "peer": away[0] if away else None,
    }


def choose_interface(verdict: dict, card: dict) -> str | None:
    """The interface through which the rank of ``card`` reaches the others."""
    try:
        if verdict["alone"]:
            return network.loopback()
        if card["address"] and not network.is_loopback(card["address"]):
            return card["interface"]
        # On the store's own host, where MASTER_ADDR may be a name for the loopback.
        return network.interface_towards(verdict["peer"]) if verdict["peer"] else None
    except OSError:
        return None


def present(cards: Mapping[int, dict]) -> str:
    """ "ranks 0-7 on h1, ranks 8-15 on h2": those of ``cards``."""
    hosts: dict[str, list[int]] = {}
    for rank, card in cards.items():
        hosts.setdefault(card["host"], []).append(rank)
    there = [f"{ranks_text(ranks)} on {host}" for host, ranks in hosts.items()]
    more = f" and {len(there) - NAMED_HOSTS} more hosts" if len(there) > NAMED_HOSTS else ""
    return f"{', '.join(there[:NAMED_HOSTS])}{more}"


def named(ranks: Sequence[int], world: int, local: int) -> str:
    """ "ranks 2-3 of 4 (node 1: h2)": nodes where every host has ``local`` ranks (0: not known), names where the
    launcher tells them in DCPO_HOSTS."""
    text = f"{ranks_text(ranks)} of {world}"
    if not 0 < local < world:
        return text
    names = [name for name in os.environ.get("DCPO_HOSTS", "").split(",") if name]
    nodes = list(dict.fromkeys(rank // local for rank in ranks))
    if len(names) * local == world:
        words = [f"{node}: {names[node]}" for node in nodes[:NAMED_HOSTS]] + ["..."] * (len(nodes) > NAMED_HOSTS)
        return f"{text} (node {', '.join(words)})"
    return f"{text} (node{'s' if len(nodes) > 1 else ''} {runs_text(nodes)})"


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-7, 9"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + runs_text(ranks)


def runs_text(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(words[:20] + ["..."] * (len(words) > 20))


def wrong_names(variables: Sequence[str]) -> list[str]:
    return [wrong for variable in variables if (wrong := network.unknown_interface(variable))]


def unreached(address: str, port: int, seconds: float) -> str:
    """Why nobody is reached there; "" where somebody is."""
    until, reason = time.monotonic() + seconds, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((address, port), timeout=seconds / 2).close()
            return ""
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    return reason


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def rendezvous_host() -> str | None:
    """Where torchrun's agents have met, as its command line or environment says; None where they do not."""
    said = os.environ.get("PET_RDZV_ENDPOINT", "")
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        for word, following in pairwise(words):
            name, _, value = word.partition("=")
            if name.replace("_", "-") == "--rdzv-endpoint":
                said = value or following
    host, colon, port = said.rpartition(":")
    return network.bare(host if colon and port.isdecimal() else said) or None
