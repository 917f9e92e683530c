"""Small requests around the weights themselves: update sessions, the tag of weights under way, the prefix cache, memory
of servers that share the trainer's GPUs."""

from __future__ import annotations

from dcpo_megatron.rollout.fleet import UNVERIFIED
from dcpo_megatron.rollout.server import Server, ServerError

__all__ = ["RELEASED", "UNVERIFIED"]
# Behind the tag of a server whose memory is released: also a run that did not release it sees it.
RELEASED = ".released"
_BEGIN, _END = "/begin_weight_update", "/end_weight_update"


def tag_weights(server: Server, tag: str, seconds: float) -> None:
    """What the server says its weights are, from the next token on; requests under way go on. Raises ServerError."""
    server.post("/update_weight_version", {"new_version": tag, "abort_all_requests": False}, timeout=seconds)


def begin_session(server: Server, seconds: float) -> None:
    """Opens an update session where the server's version has them; one that a killed trainer left open is closed first.
    Raises ServerError."""
    if not server.offers(_BEGIN):
        return
    try:
        server.post(_BEGIN, {"selector": "all"}, timeout=seconds)
    except ServerError as error:
        if error.status != 400:
            raise
        server.post(_END, {}, timeout=seconds)
        server.post(_BEGIN, {"selector": "all"}, timeout=seconds)


def end_session(server: Server, seconds: float) -> None:
    """Closes the session, which lets the server lay its weights out for use. Raises ServerError."""
    if server.offers(_BEGIN):
        server.post(_END, {}, timeout=seconds)


def flush_cache(server: Server, pause: str, seconds: float) -> None:
    """Empties the prefix cache, whose entries are of the old weights. Raises ServerError.

    Some versions refuse it while retracted requests wait; those requests are ended then, as no token may come from two
    versions' weights.
    """
    if pause == "in_place":
        return
    try:
        server.post(f"/flush_cache?timeout={0 if pause == 'retract' else int(min(seconds, 10))}", {}, timeout=seconds)
    except ServerError as error:
        if error.status != 400 or pause != "retract":
            raise
        server.pause("abort", timeout=seconds)
        server.post("/flush_cache?timeout=10", {}, timeout=seconds)


def release_memory(server: Server, seconds: float) -> None:
    """Frees all memory that an idle server can free (started with --enable-memory-saver): weights, cache, and captured
    graphs where it knows that. Raises ServerError."""
    tag = server.weight_version()
    if not tag.endswith(RELEASED):
        # The tag first: memory taken back that was never released ends the server, memory never taken back only this
        # publication. Without tags: every kind of memory that its version knows.
        server.post("/release_memory_occupation", {}, timeout=seconds)
        tag_weights(server, tag + RELEASED, seconds)


def resume_memory(server: Server, seconds: float) -> None:
    """Takes back what :func:`release_memory` freed. Raises ServerError."""
    server.post("/resume_memory_occupation", {}, timeout=seconds)
