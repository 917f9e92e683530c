"""One host's part of a run that ``tools/launch_cluster.py`` starts: torchrun, whose exit code is the ranks' own and
which takes orders on standard input.

    launcher == ssh ==> stdin: "TERM", "USR1", ...  -->  that signal to every rank of this host, once
                        end of stdin, or silence    -->  the launcher or the connection is gone: SIGTERM to the ranks,
                                                         which save and end
    launcher <== ssh == stdout: READY, then what the ranks say, through a pipe that outlives the connection
                        exit code of the rank that failed first

Plain torchrun gives its ranks 30 seconds after SIGTERM, dies of SIGUSR1, and ends with 1 whatever its ranks ended with:
"start me again" would be lost.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
import threading
import traceback

from dcpo_megatron.launch.signals import BAD_INPUT
from dcpo_megatron.network import is_loopback

READY = "dcpo: this host is ready"
# The launcher writes an empty line so often. Where its host has lost its power nothing ends the connection: what has
# heard nothing for so long gives it up.
SIGN_OF_LIFE_SECONDS = 15.0
GIVEN_UP_SECONDS = 180.0


def main(argv: list[str] | None = None) -> int:
    """Starts the ranks of this host and waits for them; returns 0, or the exit code of the first that failed (128 + N
    where signal N ended it)."""
    parser = argparse.ArgumentParser(prog="python -m dcpo_megatron.launch.ssh_node", allow_abbrev=False)
    for name in ("nnodes", "node-rank", "nproc-per-node", "master-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument(
        "--master-addr",
        required=True,
        help="where ranks meet; several, separated by commas: the first that this host knows",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="-- and what `dcpo train` takes")
    args = parser.parse_args(argv)
    master = choose_address(args.master_addr.split(","))
    if master is None:
        said = f"host {socket.gethostname()} does not know where ranks meet: {args.master_addr} does not resolve there"
        print(f"dcpo: error: {said}: give --master-addr an address of the first host", file=sys.stderr, flush=True)
        return BAD_INPUT
    orders = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # not for the ranks
    lost = threading.Event()
    relay = _relay_output(lost)
    print(READY, flush=True)
    threading.Thread(target=_obey, args=(orders, GIVEN_UP_SECONDS, lost), daemon=True).start()
    try:
        code = _run(args, master)
    except Exception:  # printed here: the interpreter would print it where nobody reads any more
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    for number in (1, 2):  # the pipe's end, where no rank is left: what is in it is still to be read
        os.dup2(0, number)
    relay.join(10)
    return code


def _run(args: argparse.Namespace, master: str) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    command = [
        f"--nnodes={args.nnodes}", f"--node-rank={args.node_rank}", f"--nproc-per-node={args.nproc_per_node}",
        f"--master-addr={master}", f"--master-port={args.master_port}",
        "-m", "dcpo_megatron.cli", "train", *args.rest[1:],
    ]  # fmt: skip
    try:
        run(parse_args(command))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    return 0


def choose_address(places: list[str]) -> str | None:
    """The first of ``places`` that resolves here to more than this host's loopback; else the first that resolves; None
    where none does."""
    known = {}
    for place in places:
        try:
            known[place] = [entry[4][0] for entry in socket.getaddrinfo(place, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            continue
    routed = [place for place, addresses in known.items() if not all(map(is_loopback, addresses))]
    return next(iter([*routed, *known]), None)


def _relay_output(lost: threading.Event) -> threading.Thread:
    """Puts a pipe in the place of this process's output, and of its ranks': they can write, and so save, when nobody
    reads any more. ``lost``: that is so."""
    out = os.dup(1)
    source, into = os.pipe()
    for number in (1, 2):
        os.dup2(into, number)
    os.close(into)

    def relay() -> None:
        while said := os.read(source, 65536):
            while said and not lost.is_set():
                try:
                    if select.select([], [out], [], 1.0)[1]:
                        said = said[os.write(out, said[: select.PIPE_BUF]) :]
                except OSError:
                    lost.set()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    return thread


def _obey(orders: int, silence: float, lost: threading.Event) -> None:
    rest = b""
    while select.select([orders], [], [], silence)[0] and (said := os.read(orders, 4096)):
        *lines, rest = (rest + said).split(b"\n")
        for line in filter(None, lines):
            _signal_ranks(getattr(signal, f"SIG{line.decode().strip()}"))
    print(
        "dcpo: the launcher or the way to it is gone: the ranks of this host save and end", file=sys.stderr, flush=True
    )
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
