"""Starts ranks on this machine through torchrun's own launcher, and gives back one exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def run_ranks(count: int, command: list[str], environment: dict[str, str] | None = None) -> int:
    """Runs ``python COMMAND`` as ``count`` ranks; waits; returns the exit code of the ranks (the first one's that failed, as the ranks gave it).

    One rank runs without a launcher. An interrupt is passed on to the ranks.
    """
    env = {**os.environ, **(environment or {})}
    # A checkout that is not installed must be found by the ranks too.
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    if count == 1:
        return _wait(subprocess.Popen([sys.executable, *command], env=env))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # The launcher reports a failed child by a traceback of its own and exits with 1: the child's code travels in a file.
    launcher = [sys.executable, "-m", "dcpo_megatron.cli.launch", str(count), *command]
    return _wait(subprocess.Popen(launcher, env=env))


def _wait(process: subprocess.Popen) -> int:
    """Waits; an interrupt or a termination of this process is passed on, so that no rank outlives it."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _launch(count: int, command: list[str]) -> int:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="dcpo",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"dcpo: error: rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
            return 128 - failure.exitcode
        if failure.exitcode != 2:
            print(
                f"dcpo: error: rank {rank} ended with exit code {failure.exitcode}; its own message is above",
                file=sys.stderr,
            )
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(_launch(int(sys.argv[1]), sys.argv[2:]))
