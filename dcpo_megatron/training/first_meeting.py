"""What every rank tells the others once, before anything is built: who it is, what it runs, and with which
configuration.

    rank R  -- host, process, doors, versions, configuration, prompts -->  all ranks: the same?
               one sentence on every rank where not
    rank 0  -- a new file in OUTPUT/health -->  seen by all ranks?
               or OUTPUT is not the same folder

A rank that was started from another checkout, or by another command, would train along for a while, or wait in a
collective that the others do not join.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

from dcpo_megatron import network
from dcpo_megatron.checkpoint.resume import flat, versions
from dcpo_megatron.config.schema import Config, ConfigError
from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.files import digest_of_sources
from dcpo_megatron.monitor.heartbeat import health_folder, ranks_in_words
from dcpo_megatron.monitor.reach import Door, Peer

# What may lie elsewhere on each host: copies of the model and the data; the prompts themselves are compared.
_A_HOSTS_OWN = ("model.path", "data.files", "evaluation.files", "publish.address")
_SHOWN = 4
# A network file system may show a new file a little later on the other hosts.
FOLDER_SECONDS = 20.0


def hold_first_meeting(config: Config, prompts: str, door: Door) -> list[Peer]:
    """Introduces all ranks to one another: every rank in its order. Collective.

    Args:
        prompts: fingerprint of the prompts that this rank has read.
        door: where this rank can be found.

    Raises:
        ConfigError: on every rank, where one has another version, configuration or other prompts than rank 0, or
        another folder ``output``.
    """
    card = {
        "host": socket.gethostname(), "pid": os.getpid(), "stack": network.stack(), "doors": door.places,
        "runs": _runs(),
        "config": config.model_dump(mode="json"), "prompts": prompts,
    }  # fmt: skip
    cards = [json.loads(answer) for answer in all_gather_on_host(json.dumps(card).encode())]
    if problem := difference(cards):
        raise ConfigError(problem)
    patience = min(FOLDER_SECONDS, config.training.timeout_seconds / 2)
    _refuse_another_folder(Path(config.output), [card["host"] for card in cards], patience)
    return [
        Peer(rank, card["host"], card["pid"], tuple((address, port) for address, port in card["doors"]), card["stack"])
        for rank, card in enumerate(cards)
    ]


def difference(cards: list[dict]) -> str | None:
    """One sentence about the ranks that are not as rank 0 is; None where all are alike."""
    first = cards[0]
    for what, advice in (
        ("runs", "install the same on every host, and start all ranks anew"),
        ("config", "give every rank the same command"),
        ("prompts", "bring the same data.files to every host"),
    ):
        other = next((card for card in cards if _differs(first, card, what)), None)
        if other is None:
            continue
        alike = [rank for rank, card in enumerate(cards) if card["host"] == other["host"] and card[what] == other[what]]
        rest = sum(bool(_differs(first, card, what)) for card in cards) - len(alike)
        who = f"{ranks_in_words(alike)} on host {other['host']}" + (f" (and {rest} more)" if rest else "")
        kind = {"runs": "runs another version", "config": "has another configuration", "prompts": "has other prompts"}
        return f"{who} {kind[what]} than rank 0 on host {first['host']}: {_differs(first, other, what)}: {advice}"
    return None


def _differs(first: dict, card: dict, what: str) -> str:
    """How two ranks' cards differ, in words; "" where they do not."""
    if first[what] == card[what]:
        return ""
    if what == "prompts":
        return "data.files hold other prompts there, or in another order"
    if what == "runs":
        here, there = first[what], card[what]
    else:
        here, there = ({k: v for k, v in flat(one[what]).items() if k not in _A_HOSTS_OWN} for one in (first, card))
    changed = {k: (here.get(k), there.get(k)) for k in here.keys() | there.keys() if here.get(k) != there.get(k)}
    said = [f"{name} is {there!r}, on rank 0 {here!r}" for name, (here, there) in sorted(changed.items())[:_SHOWN]]
    return "; ".join(said + ([f"{len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []))


def _runs() -> dict[str, str]:
    """The packages that the ranks' numbers depend on; the project's own by its sources, for two checkouts have one
    version."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"sources of dcpo_megatron": digest_of_sources(), **versions(), "python": python}


def _refuse_another_folder(output: Path, hosts: list[str], patience: float) -> None:
    """Raises ConfigError on every rank where a file of rank 0 in ``output`` is not there on another: it would take
    all checkpoints for damaged, or write its own elsewhere."""
    rank, health = dist.get_rank(), health_folder(output)
    name = f"meeting-{secrets.token_hex(8)}"
    if rank == 0:
        (health / name).touch()
    name = all_gather_on_host(name.encode())[0].decode()
    until = time.monotonic() + patience
    while not (seen := (health / name).exists()) and time.monotonic() < until:
        time.sleep(0.2)
    answers = all_gather_on_host(b"1" if seen else b"")
    if rank == 0:
        (health / name).unlink(missing_ok=True)
    if blind := [number for number, answer in enumerate(answers) if not answer]:
        alike = [number for number in blind if hosts[number] == hosts[blind[0]]]
        raise ConfigError(
            f"{ranks_in_words(alike)} on host {hosts[alike[0]]} does not see what rank 0 on host {hosts[0]} writes to "
            f"output={output}: "
            "see that the same shared folder is mounted there on every host"
        )
