"""Real SGLang servers for tests, on the CPU, from the environment that `make .venv-sglang/.installed` builds.

DCPO_TEST_SGLANG: `required` (set by `make test`) fails where that environment is missing, and a test would otherwise
skip; `latest` is that, with the newest SGLang.
"""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from dcpo_megatron.rollout.serving import Servers, start_servers
from dcpo_megatron.rollout.serving.command import default_command

LATEST = Path(__file__).resolve().parents[1] / ".venv-sglang" / "sglang-0.5.23"


def python_path() -> str | None:
    """What the servers' import path begins with. Skips, or fails, where there is no server environment."""
    wanted = os.environ.get("DCPO_TEST_SGLANG", "")
    if default_command() is None or (wanted == "latest" and not LATEST.is_dir()):
        refuse = pytest.fail if wanted else pytest.skip
        refuse("no server environment: run `make .venv-sglang/.installed` (`make test-sglang-latest` for the newest)")
    return str(LATEST) if wanted == "latest" else None


def loopback_ipv6() -> str:
    """The IPv6 loopback address; that of IPv4 on a host without it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return "::1"
    return "127.0.0.1"


def server_options() -> list[str]:
    """The same for `dcpo serve`."""
    folder = python_path()
    return ["--python-path", folder] if folder else []


def serve(
    model: Path, servers: int = 1, *, arguments: tuple[str, ...] = (), start_seconds: float = 180.0, **options
) -> Servers:
    """Small servers of ``model``: ``with serve(folder) as running: running.urls``. A start takes some 20 s of one core;
    servers started together share the wait."""
    small = ("--max-running-requests", "16", *arguments)
    return start_servers(
        model, servers, device="cpu", arguments=small, python_path=python_path(), start_seconds=start_seconds, **options
    )  # fmt: skip
