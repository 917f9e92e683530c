"""One server's command line and environment: the defaults for reinforcement learning, on a GPU and on a CPU, as a pure
function.

    python sglang_server.py --model-path MODEL --host H --port P [defaults of the device] [what the user gave after --]

What the user gives comes last, and SGLang takes the last of two equal arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcpo_megatron.gpus import VISIBLE
from dcpo_megatron.rollout.addresses import LOOPBACK
from dcpo_megatron.rollout.serving.api_key import API_KEY_VARIABLE

MODULE = Path(__file__).with_name("sglang_server.py")
# The tag of weights that no run has published: what a server serves when it has just started.
UNPUBLISHED = "unpublished"

COMMON = (
    "--weight-version", UNPUBLISHED,
    # Token ids in, token ids out: a response is never text on its way, and what ends it is said by the trainer's
    # stop_token_ids, not by a second tokenizer.
    "--skip-tokenizer-init",
    # An idle scheduler would spin on a core that the trainer wants.
    "--sleep-on-idle",
)  # fmt: skip
# The radix cache stays on: the G responses of a prompt share its prefix, and publishing flushes it. The memory fraction
# is SGLang's own choice where the server has the GPU to itself.
COLOCATED = (
    # Weights and cache can leave the GPU while the trainer has it (/release_memory_occupation) ...
    "--enable-memory-saver",
    # ... but what the trainer keeps there all the time (its own weights, communicators) needs room too.
    "--mem-fraction-static", "0.6",
)  # fmt: skip
CPU = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--disable-cuda-graph", "--disable-overlap-schedule", "--dtype", "float32",
    "--max-total-tokens", "8192", "--grammar-backend", "none",
    # Each request's seed decides its tokens. On a GPU it costs speed, and is for the user to ask for.
    "--enable-deterministic-inference",
    # It would only sample once more: nothing is compiled or captured.
    "--skip-server-warmup",
)  # fmt: skip
# These of SGLang's own arguments decide for themselves on which GPUs a server is.
PLACING = (
    "--base-gpu-id",
    "--gpu-id-step",
    "--tp",
    "--tp-size",
    "--tensor-parallel-size",
    "--dp",
    "--dp-size",
    "--data-parallel-size",
    "--pp-size",
    "--pipeline-parallel-size",
)
# Hosts that mean every interface; a server then speaks to itself through loopback.
WIDE = ("0.0.0.0", "::", "")
# A launcher among a trainer's ranks must not make the server one of them, and the trainer's import path leads to
# another torch.
NOT_PASSED_ON = (
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
    "MASTER_ADDR", "MASTER_PORT",
    API_KEY_VARIABLE,
)  # fmt: skip


@dataclass(frozen=True)
class ServerPlan:
    """What to start, the same for all servers of one launcher.

    Attributes:
        model: a Hugging Face folder (or a name that the server's machine resolves).
        command: the words before the module's path: the server environment's interpreter, or a container's command that
            ends with one.
        device: "cuda" or "cpu".
        host: the interface to listen on.
        tp: tensor-parallel GPUs of one server.
        colocated: the server shares its GPUs with the trainer.
        arguments: more of SGLang's, after the defaults.
        api_key: what every request must carry; None: nothing.
        python_path: folders to put on the server's import path, such as an unpacked wheel.
        gpus: names for CUDA_VISIBLE_DEVICES, of the GPUs that the servers share out; None: that variable stays as it
            is.
        uuids: of the GPUs that servers take from, in their order; None for one that is not known.
    """

    model: str
    command: tuple[str, ...]
    device: str
    host: str = "127.0.0.1"
    tp: int = 1
    colocated: bool = False
    arguments: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    python_path: str | None = None
    gpus: tuple[str, ...] | None = None
    uuids: tuple[str | None, ...] = ()


def command_line(plan: ServerPlan, number: int, port: int) -> list[str]:
    """The words that start server ``number`` (it takes the GPUs from ``number * tp`` on, of those visible). The key is
    not among them."""
    words = [*plan.command, str(MODULE), "--model-path", plan.model, "--host", plan.host, "--port", str(port), *COMMON]
    if plan.device == "cpu":
        words += CPU
    else:
        words += ["--tp-size", str(plan.tp), "--base-gpu-id", str(number * plan.tp)]
        words += COLOCATED if plan.colocated else ()
    return [*words, *plan.arguments]


def uuids_of(plan: ServerPlan, number: int) -> list[str] | None:
    """The uuids of server ``number``'s GPUs; None where they are not known, or the user's own arguments place it."""
    mine = plan.uuids[number * plan.tp : (number + 1) * plan.tp]
    known = [uuid for uuid in mine if uuid is not None]
    placed = any(word.partition("=")[0] in PLACING for word in plan.arguments)
    return None if placed or len(known) < len(mine) or not mine else known


def environment(plan: ServerPlan, servers: int, of: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of one of ``servers`` servers on this host."""
    env = {name: value for name, value in of.items() if name not in NOT_PASSED_ON}
    if plan.python_path:
        env["PYTHONPATH"] = plan.python_path
    # /health says whether the HTTP process answers, at once and while paused; /health_generate still samples a token.
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    env["PYTHONUNBUFFERED"] = "1"
    env |= without_proxy(of, [*LOOPBACK, *([] if plan.host in WIDE else [plan.host])])
    if plan.gpus is not None:
        env[VISIBLE] = ",".join(plan.gpus)
    if plan.device == "cuda":
        # Numbers are those of nvidia-smi, also where the GPUs of a host differ.
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if plan.colocated:
            # Captured graphs are among the memory that a server can release.
            env.setdefault("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "true")
    if plan.device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        # SGLang compiles its seeded sampler, which needs a C++ compiler and does not pay on a CPU.
        env["TORCH_COMPILE_DISABLE"] = "1"
        # glibc keeps the memory of a bucket of weights for the next one: given back, its pages cost as much again as
        # receiving into them.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            env.setdefault(name, str(2**40))
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // servers)))
    return env


def without_proxy(of: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """``no_proxy`` and ``NO_PROXY`` of ``of`` with ``hosts`` besides: SGLang's requests to itself must not go to a
    proxy. IPv6 addresses without brackets: httpx, which servers import, raises at a bracket."""
    found = {}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        # Where one of the two is not set, programs read the other.
        entries = [entry.strip() for entry in (of.get(name) or of.get(other) or "").split(",") if entry.strip()]
        # "*" is everything, where it stands alone.
        found[name] = "*" if "*" in entries else ",".join(dict.fromkeys([*entries, *hosts]))
    return found


def default_command() -> Sequence[str] | None:
    """The interpreter of the server environment that `make` builds in the checkout; None where it is not there."""
    python = Path(__file__).resolve().parents[3] / ".venv-sglang" / "bin" / "python"
    return (str(python),) if python.is_file() else None
