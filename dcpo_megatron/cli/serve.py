"""``dcpo serve MODEL``: stock SGLang servers on this host, kept alive until the command ends.

Exit codes: 0 stopped by SIGTERM or SIGINT; 1 a server did not start, or none is left; 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from dcpo_megatron.launch.signals import BAD_INPUT
from dcpo_megatron.processes import handling, signal_name
from dcpo_megatron.rollout.serving import ServingError, start_servers
from dcpo_megatron.rollout.serving.api_key import API_KEY_VARIABLE, read_api_key

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def parser() -> argparse.ArgumentParser:
    """The command line of ``dcpo serve``."""
    result = argparse.ArgumentParser(
        prog="dcpo serve",
        allow_abbrev=False,
        usage="%(prog)s MODEL [options] [-- SGLANG'S OWN ARGUMENTS]",
        description=(
            "Starts stock SGLang servers of one model on this host and keeps them alive. docs/serving.md tells more."
        ),
    )
    result.add_argument("model", metavar="MODEL", help="a Hugging Face folder: the one that the trainer starts from")
    where = result.add_mutually_exclusive_group()
    where.add_argument("--python", help="the server environment's interpreter (default: the checkout's .venv-sglang)")
    where.add_argument(
        "--command", help="instead: a command that ends with one, such as 'apptainer exec --nv IMAGE python3'"
    )
    result.add_argument("--servers", type=int, default=1, metavar="N", help="default: %(default)s")
    result.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    result.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs of one server (default: %(default)s)")
    result.add_argument(
        "--gpus",
        metavar="LIST",
        help=(
            "which GPUs the servers share out: 4-7, or 4,5,6,7 (numbers among the visible ones), or uuids (default:"
            " from 0 on)"
        ),
    )
    result.add_argument(
        "--colocated", action="store_true", help="the trainer shares the GPUs: their memory can be released"
    )
    result.add_argument("--host", default="127.0.0.1", help="interface (default: %(default)s); another one needs a key")
    result.add_argument(
        "--port", type=int, default=30000, help="of the first server; the others follow (default: %(default)s)"
    )
    result.add_argument(
        "--advertise", metavar="NAME", help="this host's name for the trainer (default: --host, or the host's own name)"
    )
    result.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"what every request must carry (default: the variable {API_KEY_VARIABLE})",
    )
    result.add_argument(
        "--address-file",
        type=Path,
        metavar="FILE",
        help="gets the JSON list of the addresses once all are ready: the trainer's servers.file",
    )
    result.add_argument(
        "--logs", type=Path, default=Path("runs/servers"), metavar="FOLDER", help="default: %(default)s"
    )
    result.add_argument(
        "--start-timeout", type=float, default=600.0, metavar="S", help="seconds to be ready (default: %(default)g)"
    )
    result.add_argument(
        "--hung-after",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds without any answer until a server is started again (default: %(default)g)",
    )
    result.add_argument(
        "--python-path", metavar="FOLDERS", help="for the server's import path, such as an unpacked wheel"
    )
    return result  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    own, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser().parse_args(own)
    # A signal during the start counts too: what has been started is stopped on the way out.
    with handling(STOP_SIGNALS, _interrupt):
        try:
            return _serve(args, passed_on)
        except _Interrupted as stopped:
            _say(f"{stopped}: all servers are stopped")
            return 0


def _serve(args: argparse.Namespace, passed_on: list[str]) -> int:
    try:
        running = start_servers(
            args.model,
            args.servers,
            command=[args.python] if args.python else shlex.split(args.command or ""),
            device=args.device,
            tp=args.tp,
            gpus=args.gpus,
            colocated=args.colocated,
            host=args.host,
            port=args.port,
            api_key=read_api_key(args.api_key_file),
            arguments=passed_on,
            python_path=args.python_path,
            logs=args.logs,
            start_seconds=args.start_timeout,
            hung_seconds=args.hung_after,
            advertise=args.advertise,
            address_file=args.address_file,
            say=_say,
        )
    except (ServingError, ValueError) as error:
        _say(f"error: {error}")
        return BAD_INPUT
    try:
        with running:
            _say(f"serving on {' '.join(running.urls)}; logs in {args.logs}")
            while len(running.given_up) < args.servers:
                time.sleep(0.5)
        _say("error: no server is left")
    except ServingError as error:
        _say(f"error: {error}")
    return 1


class _Interrupted(BaseException):
    pass


def _interrupt(number: int, frame) -> None:
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # stopping is under way
    raise _Interrupted(signal_name(number))


def _say(text: str) -> None:
    print(f"dcpo: {text}", file=sys.stderr, flush=True)
