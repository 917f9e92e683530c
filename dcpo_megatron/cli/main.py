"""``dcpo COMMAND``: finds the command's module and runs it. Each module imports what it needs only when it runs."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "train a model: dcpo train --config FILE.yaml key.sub=value ...",
    "demo": "a small run from nothing to a better model, on a CPU, in minutes",
    "eval": "accuracy of a model on files of problems, every response kept: dcpo eval MODEL FILE ...",
    "report": "a picture page of any run, one HTML file: dcpo report RUN",
    "compare": "several methods on equal terms, several seeds: dcpo compare PLAN.yaml",
    "serve": "SGLang servers for the rollouts, on this host: dcpo serve MODEL --servers N",
    "status": "how far a run is, and whether it is well: dcpo status RUN [--json]",
    "convert": "Hugging Face folders to Megatron checkpoints, back, and between layouts",
    "verify": "every parallel layout against one process, on its own ranks",
    "doctor": "what is installed, what fits, what will be used, and how to mend it",
}


def _usage() -> str:
    from dcpo_megatron import __version__

    lines = [f"dcpo {__version__}: DCPO training on Megatron-Core", "", "usage: dcpo COMMAND [...]", ""]
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "dcpo COMMAND --help tells more."])


def main(argv: list[str] | None = None) -> int:
    """Runs ``argv`` (default: the process's); returns the exit code. 2: the command line is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from dcpo_megatron import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"dcpo: error: no command {argv[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(f"dcpo_megatron.cli.{argv[0]}").main(argv[1:])
