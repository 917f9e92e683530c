"""``dcpo verify``: does every parallel layout give the gradient of one process? Starts its own ranks and prints a
table.

Exit codes: 0 every layout passed; 1 one failed; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform as python_platform
import sys
import time
from pathlib import Path

from dcpo_megatron.console.quiet import quiet_libraries


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dcpo verify",
        allow_abbrev=False,
        description=(
            "Compares loss, gradients and one optimizer step of every parallel layout with a dense single-process"
            " reference."
        ),
    )
    result.add_argument(
        "--layouts",
        default="all",
        help="all, fast, or names separated by commas: those of --list, or any like tp2-sp-cp2/padded/moe/m4",
    )
    result.add_argument(
        "--preset",
        default="all",
        help=(
            "objectives: all, or names separated by commas: those of --list, or any preset, with switches like dapo+kl"
        ),
    )
    result.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu with gloo, or cuda with nccl (a GPU a rank)"
    )
    result.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations; bfloat16 has a bound of its own (docs/parallelism.md)",
    )
    result.add_argument(
        "--transformer-engine",
        choices=("auto", "on", "off"),
        default="auto",
        help="its layers or the local ones; auto: its layers for bfloat16 on GPUs where it imports",
    )
    result.add_argument("--seed", type=int, default=0, help="of weights and data")
    result.add_argument("--max-ranks", type=int, default=None, help="leave out layouts of more ranks")
    result.add_argument(
        "--megatron-path", default=None, metavar="DIR", help="folder with another megatron package to certify"
    )
    result.add_argument("--json", default=None, metavar="FILE", help="write every verdict there")
    result.add_argument("--markdown", default=None, metavar="FILE", help="write the table there")
    result.add_argument("--timeout", type=float, default=600.0, help="seconds a layout may take")
    result.add_argument("--list", action="store_true", help="list layouts and objectives, and stop")
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the certificate; returns the exit code."""
    args = parser().parse_args(argv)
    quiet_libraries()
    from dcpo_megatron.verification import cases
    from dcpo_megatron.verification.layouts import FAST, NAMES, find_layouts

    if args.list:
        print("layouts:    " + ", ".join(NAMES))
        print("fast:       " + ", ".join(FAST))
        print("objectives: " + ", ".join(cases.OBJECTIVES))
        return 0
    try:
        layouts = find_layouts(args.layouts)
        objectives = cases.find_objectives(args.preset)
        if args.max_ranks is not None:
            layouts = [layout for layout in layouts if layout.world <= args.max_ranks]
        _check(args, layouts)
        engine = _transformer_engine(args)
    except ValueError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    return _run(args, layouts, objectives, engine)


def _check(args: argparse.Namespace, layouts: list) -> None:
    """Raises ValueError for everything that would be known wrong only after minutes."""
    if not layouts:
        raise ValueError("no layout is left: raise --max-ranks")
    for file in filter(None, (args.json, args.markdown)):
        folder = Path(file).absolute().parent
        if not folder.is_dir() or Path(file).is_dir():
            raise ValueError(f"{file} cannot be written: {folder} is no folder, or the file is one")
    if args.megatron_path and not (Path(args.megatron_path) / "megatron" / "core").is_dir():
        raise ValueError(
            f"--megatron-path {args.megatron_path} has no megatron/core: unpack a wheel of megatron-core there"
        )
    if args.device == "cuda":
        import torch

        needed = max(layout.world for layout in layouts)
        if torch.cuda.device_count() < needed:
            raise ValueError(
                f"these layouts need {needed} GPUs and {torch.cuda.device_count()} are visible: lower --max-ranks, or"
                " --device cpu"
            )


def _transformer_engine(args: argparse.Namespace) -> str:
    """ "on" or "off", as a run of this dtype on this device has it. Raises ValueError where it is asked for and
    refused."""
    from dcpo_megatron.mcore.platform import select_platform, use_transformer_engine

    return "on" if use_transformer_engine(args.transformer_engine, args.dtype, select_platform(args.device)) else "off"


def _run(args: argparse.Namespace, layouts: list, objectives: dict, engine: str) -> int:
    import torch
    from rich.console import Console

    from dcpo_megatron.verification import certificate

    console = Console(highlight=False)
    layers = "local" if engine == "off" else "transformer-engine"
    facts = versions(args.device, args.megatron_path) | {"dtype": args.dtype, "layers": layers}
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    bound = f"relative error per parameter, at most {certificate.GRADIENT_TOLERANCE:.0e}"
    if args.dtype == "bfloat16":
        bound = (
            "error per parameter in multiples of bf16's own in one process, at most"
            f" {certificate.BOUNDS[args.dtype].error:g}"
        )
    console.print(f"{len(layouts)} layouts x {len(objectives)} objectives; {bound}")
    started = time.perf_counter()
    pending: list = []

    def report(verdict) -> None:
        pending.append(verdict)
        if len(pending) == len(objectives):
            _print_layout(console, pending)
            pending.clear()

    torch.set_num_threads(1)  # the ranks need the cores, and the reference is small
    verdicts = certificate.certify(
        layouts,
        objectives,
        device=args.device,
        megatron_path=args.megatron_path,
        report=report,
        timeout=args.timeout,
        seed=args.seed,
        dtype=args.dtype,
        transformer_engine=engine,
    )
    failed = sorted({verdict.layout for verdict in verdicts if not verdict.passed})
    if args.json:
        certificate.write_json(verdicts, args.json, facts)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write(certificate.markdown_table(verdicts) + "\n")
    console.print(
        f"{len(layouts) - len(failed)} of {len(layouts)} layouts passed in {time.perf_counter() - started:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def _print_layout(console, verdicts) -> None:
    worst = max(verdicts, key=lambda v: v.gradient_error if v.gradient_error == v.gradient_error else float("inf"))
    last = verdicts[-1]

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    mark = "[green]pass[/green]" if all(v.passed for v in verdicts) else "[red]FAIL[/red]"
    line = (
        f"{mark}  {worst.layout:<28} {worst.world} ranks  gradient {worst.gradient_error:.1e} ({worst.objective},"
        f" {worst.worst_parameter})  loss {max(v.loss_error for v in verdicts):.1e}  norm {show(last.norm_error)}  SGD"
        f" {show(last.sgd_error)}  Adam {show(last.adam_error)}  log-probs"
        f" {max(v.distribution_error for v in verdicts):.1e}  SAS {last.history_error:.0e} "
        f" {sum(v.seconds for v in verdicts):.1f} s"
    )
    console.print(line, soft_wrap=True)
    if not all(v.replicas_agree for v in verdicts if not v.failure):
        console.print("replicas of a parameter differ between ranks after a step", soft_wrap=True)
    for failure in {v.failure for v in verdicts if v.failure}:
        console.print(failure, markup=False, soft_wrap=True)


def versions(device: str, megatron_path: str | None) -> dict[str, str]:
    """What the verdicts were measured with."""
    import torch

    megatron = importlib.metadata.version("megatron-core")
    if megatron_path:
        found = list(importlib.metadata.distributions(name="megatron-core", path=[megatron_path]))
        megatron = found[0].version if found else f"from {megatron_path}"
    return {
        "megatron-core": megatron,
        "torch": torch.__version__,
        "python": python_platform.python_version(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(0),
    }
