"""One host's part of a run that ``tools/launch_cluster.py`` starts: torchrun, whose exit code is the ranks' own and which takes orders on standard input.

    launcher == ssh ==> stdin: "TERM", "USR1", ...  -->  that signal to every rank of this host, once
                        end of stdin                -->  the launcher or the connection is gone: SIGTERM to the ranks, which save and end
    launcher <== ssh == stdout: READY, then what the ranks say;  exit code of the rank that failed first

Plain torchrun gives its ranks 30 seconds after SIGTERM, dies of SIGUSR1, and ends with 1 whatever its ranks ended with: "start me again" would be lost.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

READY = "dcpo: this host is ready"


def main(argv: list[str] | None = None) -> int:
    """Starts the ranks of this host and waits for them; returns 0, or the exit code of the first that failed (128 + N where signal N ended it)."""
    parser = argparse.ArgumentParser(prog="python -m dcpo_megatron.cli.cluster_node", allow_abbrev=False)
    for name in ("nnodes", "node-rank", "nproc-per-node", "master-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="-- and what `dcpo train` takes")
    args = parser.parse_args(argv)
    orders = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # not for the ranks
    print(READY, flush=True)
    threading.Thread(target=_obey, args=(orders,), daemon=True).start()

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    command = [
        f"--nnodes={args.nnodes}", f"--node-rank={args.node_rank}", f"--nproc-per-node={args.nproc_per_node}",
        f"--master-addr={args.master_addr}", f"--master-port={args.master_port}",
        "-m", "dcpo_megatron.cli", "train", *args.rest[1:],
    ]  # fmt: skip
    try:
        run(parse_args(command))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    return 0


def _obey(orders) -> None:
    for line in orders:
        _signal_ranks(getattr(signal, f"SIG{line.strip()}"))
    _signal_ranks(signal.SIGTERM)


def _signal_ranks(number: int) -> None:
    import psutil

    ranks = psutil.Process().children()
    if not ranks:  # not yet: the hosts still wait for one another, and nothing is lost
        os._exit(128 + number)
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            pass  # it has just ended: what the signal asks for


if __name__ == "__main__":
    sys.exit(main())
