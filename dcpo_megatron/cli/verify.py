"""``dcpo verify``: does every parallel layout give the gradient of one process? Starts its own ranks and prints a table.

Exit codes: 0 every layout passed; 1 one failed; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform as python_platform
import sys
import time

from dcpo_megatron.cli.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> int:
    """Runs the certificate; returns the exit code."""
    from dcpo_megatron.verification import cases, certificate

    parser = argparse.ArgumentParser(
        prog="dcpo verify",
        allow_abbrev=False,
        description="Compares loss, gradients and one optimizer step of every parallel layout with a dense single-process reference.",
    )
    parser.add_argument("--layouts", default="all", help="all, fast, or names separated by commas (--list shows them)")
    parser.add_argument(
        "--preset", default="all", help="objectives: all, or names separated by commas (--list shows them)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu with gloo, or cuda with nccl (a GPU a rank)"
    )
    parser.add_argument(
        "--layers",
        choices=("local", "transformer-engine"),
        default="local",
        help="which layers to certify (the second needs GPUs)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--max-ranks", type=int, default=None, help="leave out layouts of more ranks")
    parser.add_argument(
        "--megatron-path", default=None, metavar="DIR", help="folder with another megatron package to certify"
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="write every verdict there")
    parser.add_argument("--markdown", default=None, metavar="FILE", help="write the table there")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a layout may take")
    parser.add_argument("--list", action="store_true", help="list layouts and objectives, and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("layouts:    " + ", ".join(layout.name for layout in cases.LAYOUTS))
        print("fast:       " + ", ".join(cases.FAST))
        print("objectives: " + ", ".join(cases.OBJECTIVES))
        return 0
    try:
        layouts = cases.find_layouts(args.layouts)
        objectives = _objectives(args.preset, cases.OBJECTIVES)
    except ValueError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    if args.max_ranks is not None:
        layouts = [layout for layout in layouts if layout.world <= args.max_ranks]
    if not layouts:
        print("dcpo: error: no layout is left: raise --max-ranks", file=sys.stderr)
        return 2
    if args.device == "cuda":
        import torch

        needed = max(layout.world for layout in layouts)
        if torch.cuda.device_count() < needed:
            print(
                f"dcpo: error: these layouts need {needed} GPUs and {torch.cuda.device_count()} are visible: lower --max-ranks, or --device cpu",
                file=sys.stderr,
            )
            return 2
    from rich.console import Console

    quiet_libraries()
    console = Console(highlight=False)
    facts = versions(args.device, args.megatron_path) | {"layers": args.layers}
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    console.print(
        f"{len(layouts)} layouts x {len(objectives)} objectives; relative error per parameter, at most {certificate.GRADIENT_TOLERANCE:.0e}"
    )
    started = time.perf_counter()
    pending: list = []

    def report(verdict) -> None:
        pending.append(verdict)
        if len(pending) == len(objectives):
            _print_layout(console, pending)
            pending.clear()

    import torch

    torch.set_num_threads(1)  # the ranks need the cores, and the reference is small
    verdicts = certificate.certify(
        layouts,
        objectives,
        device=args.device,
        megatron_path=args.megatron_path,
        report=report,
        timeout=args.timeout,
        seed=args.seed,
        layers=args.layers,
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


def _objectives(names: str, known: dict) -> dict:
    if names == "all":
        return dict(known)
    found = {}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"unknown objective {name!r}; the known ones are: all, {', '.join(known)}")
        found[name] = known[name]
    return found


def _print_layout(console, verdicts) -> None:
    worst = max(verdicts, key=lambda v: v.gradient_error if v.gradient_error == v.gradient_error else float("inf"))
    last = verdicts[-1]

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    mark = "[green]pass[/green]" if all(v.passed for v in verdicts) else "[red]FAIL[/red]"
    line = (
        f"{mark}  {worst.layout:<28} {worst.world} ranks  gradient {worst.gradient_error:.1e} ({worst.objective}, {worst.worst_parameter})  "
        f"loss {max(v.loss_error for v in verdicts):.1e}  norm {show(last.norm_error)}  SGD {show(last.sgd_error)}  Adam {show(last.adam_error)}  "
        f"log-probs {max(v.distribution_error for v in verdicts):.1e}  SAS {last.history_error:.0e}  {sum(v.seconds for v in verdicts):.1f} s"
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
