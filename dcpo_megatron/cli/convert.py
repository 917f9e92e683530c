"""``dcpo convert``: weights between Hugging Face folders and Megatron checkpoints, and what such a folder holds.

    hf-to-megatron SRC DST      megatron-to-hf SRC DST      reshard SRC DST      inspect PATH      verify CHECKPOINT

No GPU, no process group, and one layer's tensor in memory at a time. An interrupted conversion goes on when the same
command is given again.

Exit codes: 0 done; 1 ``verify`` found another model; 2 what was given cannot be used (one clear sentence on standard
error); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from dcpo_megatron.console.quiet import quiet_libraries
from dcpo_megatron.launch.signals import BAD_INPUT, INTERRUPTED

_FLAGS = {
    "tensor": "--tp",
    "pipeline": "--pp",
    "virtual_pipeline": "--vpp",
    "expert": "--ep",
    "expert_tensor": "--etp",
    "first_stage_layers": "--first-stage-layers",
    "last_stage_layers": "--last-stage-layers",
}
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dcpo convert",
        description=(
            "Weights between Hugging Face folders and Megatron checkpoints (torch_dist) of any parallel layout."
        ),
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    to_megatron = command("hf-to-megatron", "Hugging Face folder to Megatron checkpoint")
    to_hf = command("megatron-to-hf", "Megatron checkpoint of any layout to Hugging Face folder")
    reshard = command("reshard", "Megatron checkpoint to one cut for another layout, optimizer state included")
    for sub in (to_megatron, to_hf, reshard):
        sub.add_argument("source", metavar="SRC", help="folder that is read")
        sub.add_argument("destination", metavar="DST", help="new folder; it appears when it is complete")
    for sub in (to_megatron, reshard):
        _layout_arguments(sub)
    to_hf.add_argument(
        "--shard-size", type=_bytes, default=_bytes("5GB"), metavar="SIZE", help="largest safetensors file, 5GB"
    )
    for sub in (to_megatron, to_hf, reshard):
        sub.add_argument(
            "--workers", type=_positive, default=1, metavar="N", help="processes; each holds tensors of its own"
        )
        sub.add_argument("--quiet", action="store_true", help="no progress, no summary")

    inspect = command("inspect", "What a folder of either kind holds")
    inspect.add_argument("source", metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    verify = command("verify", "Do the checkpoint and its Hugging Face model compute the same logits?")
    for sub in (to_hf, reshard, inspect, verify):
        sub.add_argument(
            "--config-from",
            default=None,
            metavar="HF",
            help="folder with config.json and tokenizer, for a checkpoint that carries none",
        )

    verify.add_argument("source", metavar="CHECKPOINT", help="Megatron checkpoint, or Hugging Face folder")
    verify.add_argument("--against", default=None, metavar="HF", help="Hugging Face folder; default: its own export")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of a logit (1e-4); a share of the largest logit where that is below 1",
    )
    tokens = verify.add_mutually_exclusive_group()
    tokens.add_argument("--tokens", type=_positive, default=32, metavar="N", help="random tokens to run (32)")
    tokens.add_argument("--token-ids", type=_numbers, default=None, metavar="1,2,3", help="these tokens")
    verify.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="in which both compute")
    return result


def _layout_arguments(sub: argparse.ArgumentParser) -> None:
    for flag, text in (
        ("--tp", "tensor-parallel size"),
        ("--pp", "pipeline-parallel size"),
        ("--ep", "expert-parallel size"),
    ):
        sub.add_argument(flag, type=_positive, default=1, metavar="N", help=f"{text} (1)")
    for flag, text in (
        ("--vpp", "model chunks a pipeline rank holds"),
        ("--etp", "tensor-parallel size of experts; as --tp where not given"),
        ("--first-stage-layers", "layers of the first pipeline stage"),
        ("--last-stage-layers", "layers of the last pipeline stage"),
    ):
        sub.add_argument(flag, type=_positive, default=None, metavar="N", help=text)
    sub.add_argument(
        "--megatron-lm",
        action="store_true",
        help="DST becomes what Megatron-LM's --load takes: the checkpoint is one folder deeper",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        again = "" if args.command in ("inspect", "verify") else ": the same command goes on where this one stopped"
        print(f"\ndcpo: interrupted{again}", file=sys.stderr, flush=True)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    quiet_libraries()
    from dcpo_megatron.mcore.hf_config import ModelConfigError
    from dcpo_megatron.weights.conversion import LayoutError
    from dcpo_megatron.weights.hf_folder import CheckpointError

    try:
        return {"inspect": _inspect, "verify": _verify}.get(args.command, _convert)(args)
    except LayoutError as error:
        return _refuse(_with_flags(str(error)))
    except (CheckpointError, ModelConfigError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename or args.source}: {error.strerror or error}")


def _refuse(text: str) -> int:
    for line in text.splitlines():
        print(f"dcpo: error: {line}", file=sys.stderr, flush=True)
    return BAD_INPUT


def _with_flags(text: str) -> str:
    """A layout's problem in the words of the command line: ``parallel.tensor=4`` is ``--tp 4`` here."""
    text = text.replace("x virtual_pipeline", "x parallel.virtual_pipeline")
    names = "|".join(sorted(_FLAGS, key=len, reverse=True))
    return re.sub(
        rf"parallel\.({names})\b(?:=(\d+))?",
        lambda match: _FLAGS[match[1]] + (f" {match[2]}" if match[2] else ""),
        text,
    )


# -- the three conversions -------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from dcpo_megatron.console.progress import Progress, size
    from dcpo_megatron.weights.conversion_jobs import run_job
    from dcpo_megatron.weights.hf_folder import CheckpointError

    if os.path.realpath(args.source) == os.path.realpath(args.destination):
        raise CheckpointError(f"{args.source} is source and destination: give a new folder as DST")
    job = _job(args)
    started = time.perf_counter()
    with Progress(args.command, args.quiet) as progress:
        resumed = run_job(job, args.destination, workers=args.workers, report=progress.report)
    if not args.quiet:
        seconds = time.perf_counter() - started
        files = [file for file in Path(args.destination).rglob("*") if file.is_file()]
        written = sum(file.stat().st_size for file in files)
        before = f"; {resumed} of {len(job.units())} parts were done before" if resumed else ""
        print(
            f"{args.destination}: {len(files)} files, {size(written)} in {seconds:.1f} s"
            f" ({size(written / seconds)}/s){before}"
        )
        print(f"next: {_next(args)}")
    return 0


def _job(args: argparse.Namespace):
    from dcpo_megatron.mcore.layout import ParallelLayout
    from dcpo_megatron.weights.conversion import HF_SUBFOLDER
    from dcpo_megatron.weights.hf_folder import CheckpointError
    from dcpo_megatron.weights.megatron_lm import InMegatronLmRoot
    from dcpo_megatron.weights.reshard import Reshard
    from dcpo_megatron.weights.to_hf import MegatronToHf
    from dcpo_megatron.weights.to_megatron import HfToMegatron
    from dcpo_megatron.weights.torch_dist import TorchDistFolder, find_checkpoint

    if not Path(args.source).is_dir():
        raise CheckpointError(f"folder {args.source} does not exist: give a local folder as SRC")
    if find_checkpoint(args.source) is None:
        if args.command != "hf-to-megatron" and (Path(args.source) / "config.json").is_file():
            raise CheckpointError(
                f"{args.source} is a Hugging Face folder, {args.command} reads a Megatron checkpoint: use"
                " hf-to-megatron"
            )
        if not (Path(args.source) / "config.json").is_file():
            _neither(args.source)
    elif args.command == "hf-to-megatron":
        raise CheckpointError(
            f"{args.source} is a Megatron checkpoint, hf-to-megatron reads a Hugging Face folder: use reshard"
            + (f" (its {HF_SUBFOLDER} folder has no weights)" if (Path(args.source) / HF_SUBFOLDER).is_dir() else "")
        )
    if args.command == "megatron-to-hf":
        return MegatronToHf(args.source, args.config_from, args.shard_size)
    layout = ParallelLayout(
        **{name: getattr(args, flag.removeprefix("--").replace("-", "_")) for name, flag in _FLAGS.items()},
        # Megatron-Core wants it with experts; it changes nothing on disk.
        sequence_parallel=args.tp > 1,
    )
    if args.command == "hf-to-megatron":
        job = HfToMegatron(args.source, layout)
        return InMegatronLmRoot(job) if args.megatron_lm else job
    job = Reshard(args.source, layout, args.config_from)
    if args.megatron_lm:
        from dcpo_megatron.weights.inspect import iteration_of

        return InMegatronLmRoot(job, iteration_of(TorchDistFolder(args.source)) or 0)
    return job


def _neither(path: str) -> None:
    """Raises: ``path`` is a folder of neither kind."""
    from dcpo_megatron.weights.hf_folder import CheckpointError
    from dcpo_megatron.weights.torch_dist import FORMAT_FILE, INDEX_FILE

    missing = "an interrupted save has no metadata.json" if list(Path(path).glob("*.distcp")) else "is the path right?"
    raise CheckpointError(
        f"{path} is neither a Hugging Face folder (config.json) nor a Megatron checkpoint ({FORMAT_FILE},"
        f" {INDEX_FILE}): {missing}"
    )


def _next(args: argparse.Namespace) -> str:
    if args.command == "megatron-to-hf":
        return f"dcpo convert verify {args.source} --against {args.destination}"
    if args.command == "hf-to-megatron":
        return f"dcpo convert verify {args.destination} --against {args.source}"
    weights = args.config_from and list(Path(args.config_from).glob("*.safetensors"))
    return f"dcpo convert verify {args.destination}" + (f" --against {args.config_from}" if weights else "")


# -- looking ---------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    import json

    from dcpo_megatron.weights.inspect import describe, lines
    from dcpo_megatron.weights.torch_dist import find_checkpoint

    if not (Path(args.source) / "config.json").is_file() and find_checkpoint(args.source) is None:
        _neither(args.source)
    facts = describe(args.source, args.config_from)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines(facts)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    import contextlib
    import tempfile

    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.weights.conversion_jobs import run_job
    from dcpo_megatron.weights.hf_folder import CheckpointError
    from dcpo_megatron.weights.logits import compare_logits
    from dcpo_megatron.weights.to_hf import MegatronToHf
    from dcpo_megatron.weights.torch_dist import find_checkpoint

    megatron = find_checkpoint(args.source)
    if megatron is None and not (Path(args.source) / "config.json").is_file():
        _neither(args.source)
    with contextlib.ExitStack() as stack:
        against = args.against
        if against is None and megatron is None:
            against = args.source
        elif against is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dcpo-verify-"))
            against = str(Path(folder) / "export")
            run_job(MegatronToHf(args.source, args.config_from), against)
        shape = read_shape(against)
        try:
            found = compare_logits(against, args.source, args.token_ids or _random_ids(args.tokens, shape), args.dtype)
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise CheckpointError(str(error)) from None
    # A model of tiny logits would pass any absolute bound.
    tolerance = args.tolerance * min(1.0, found.scale)
    passed = found.worst <= tolerance
    what = args.against or ("its own weights in transformers" if megatron is None else "its own export")
    print(
        f"{'same' if passed else 'DIFFERENT'}: {args.source} against {what}, {args.dtype}: largest difference of a"
        f" logit {found.worst:.1e} (token {found.token} at position {found.position}; tolerance {tolerance:.1e},"
        f" largest logit {found.scale:.2g}), {100 * found.agree:.0f}% of the tokens have the same most likely successor"
    )
    return 0 if passed else 1


def _random_ids(count: int, shape) -> list[int]:
    import random

    chosen = random.Random(0)
    return [chosen.randrange(shape.vocab) for _ in range(min(count, shape.max_positions))]


# -- values of options -----------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list like 1,2,3") from None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size like 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])
