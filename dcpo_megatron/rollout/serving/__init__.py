"""Starts stock SGLang servers from an environment of their own, and looks after them.

command.py          the command line: defaults for reinforcement learning      (pure)
sglang_server.py    what the server environment's Python runs                  (no import of the project)
process.py          one server as a process group
shared_files.py     what a killed one leaves in shared memory
supervisor.py       several: health, restarts, the end of all
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dcpo_megatron.gpus import VISIBLE, VisibleGpu, choose, visible_gpus
from dcpo_megatron.rollout.addresses import bare
from dcpo_megatron.rollout.serving.command import UNPUBLISHED, ServerPlan, default_command
from dcpo_megatron.rollout.serving.supervisor import Servers, ServingError, free_ports

__all__ = ["UNPUBLISHED", "ServerPlan", "Servers", "ServingError", "start_servers"]


def start_servers(
    model: str | Path,
    servers: int = 1,
    *,
    command: Sequence[str] | None = None,
    device: str = "auto",
    tp: int = 1,
    gpus: str | None = None,
    colocated: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    arguments: Sequence[str] = (),
    python_path: str | None = None,
    logs: Path | None = None,
    **watching,
) -> Servers:
    """``with start_servers(MODEL, servers=2) as running: running.urls``. Nothing is started before ``with`` (or
    ``.start()``).

    Args:
        command: the server environment's interpreter (default: the checkout's ``.venv-sglang``), or a container's
            command that ends with one.
        device: "auto" (cuda where this host shows a GPU), "cuda", "cpu".
        host: the interface: an address of either family, or a name.
        gpus: which GPUs the servers share out, such as "4-7", "4,5,6,7" or uuids; numbers are among the visible ones
            (default: those from 0 on).
        port: of the first server, the others follow (default: free ports).
        logs: folder (default: a new temporary one).
        arguments: more of SGLang's own.
        watching: ``start_seconds``, ``hung_seconds``, ``advertise``, ``address_file``, ``say`` of :class:`Servers`; the
            other arguments are those of :class:`ServerPlan`.

    Raises:
        ServingError: no server environment, too few GPUs, a port in use, or a host other than loopback without a key;
            on starting, a server that dies or is not ready in time.
    """
    command = tuple(command or default_command() or ())
    if not command:
        raise ServingError(
            "there is no server environment: run `make .venv-sglang/.installed`, or name its interpreter (--python)"
        )
    model, host = Path(model).absolute(), bare(host)
    if not (model / "config.json").is_file():
        raise ServingError(f"no model in {model}: give a Hugging Face folder, with config.json")
    if servers < 1 or tp < 1:
        raise ServingError(f"--servers {servers} and --tp {tp} must be at least 1")
    mine = gpus_for(device, gpus)
    if mine is None and tp > 1:
        raise ServingError(f"--tp {tp} needs GPUs: on a CPU a server is one process")
    if mine is not None and len(mine) < servers * tp:
        there = f"this host shows {len(mine)}" if gpus is None else f"--gpus {gpus} names {len(mine)}"
        raise ServingError(
            f"{servers} servers of {tp} GPUs need {servers * tp}, {there}: give fewer --servers or --tp"
            + ("" if gpus is None else ", or more --gpus")
        )
    plan = ServerPlan(
        str(model), command, "cpu" if mine is None else "cuda", host, tp, colocated, tuple(arguments), api_key,
        python_path,
        gpus=None if gpus is None else tuple(gpu.name for gpu in mine or ()),
        uuids=tuple(gpu.uuid for gpu in mine or ()),
    )  # fmt: skip
    ports = free_ports(servers, host) if port is None else list(range(port, port + servers))
    logs = Path(tempfile.mkdtemp(prefix="dcpo-servers-")) if logs is None else Path(logs)
    return Servers(plan, ports, logs, **watching)


def gpus_for(device: str, wanted: str | None) -> list[VisibleGpu] | None:
    """The GPUs for ``device`` "auto" | "cuda" | "cpu" of those that ``wanted`` names (None: all visible ones); None:
    serve on the CPU.

    Raises:
        ServingError: ``wanted`` on a CPU, or a GPU that is not visible here.
    """
    found = [] if device == "cpu" else visible_gpus()
    if device == "cpu" or (device == "auto" and not found):
        if wanted is not None:
            raise ServingError(
                f"--gpus {wanted}, but "
                + (
                    "--device cpu uses none"
                    if device == "cpu"
                    else f"this host shows no GPU: see {VISIBLE} and nvidia-smi"
                )
            )
        return None
    try:
        return found if wanted is None else choose(wanted, found)
    except ValueError as error:
        visible = os.environ.get(VISIBLE)
        raise ServingError(f"--gpus {wanted}: {error}" + (f" ({VISIBLE}={visible})" if visible else "")) from None
