#!/usr/bin/env python3
"""What log-probs and their gradients cost: peak memory and seconds of every head, side by side in one run, with ratios
to the full-logits path.

    python tools/bench_logprobs.py                                                            # seconds, on any machine
    python tools/bench_logprobs.py --tokens 8192 --hidden 1536 --vocab 151936 --repeats 1     # a 1.5B model's head; the
                                                                                              # full path takes 16 GB

Every row computes the mean of -log p(target) over ``tokens`` positions and its gradient with respect to hidden states
and weight. ``ours`` rows also give the exact entropy, which the others (verl's apart) do not; with ``--entropy`` an
entropy bonus with gradient is part of the loss, in the rows that have one.

**Memory** is what a row needs beyond its inputs and their gradients. On a CPU each measurement is a fresh process:
resident size once the inputs are there and touched, plus the bytes of their gradients, is the baseline; the kernel's
high-water mark of the resident size (VmHWM, reset through /proc/self/clear_refs just before) less the baseline is the
row. On a GPU it is torch.cuda.max_memory_allocated less the same baseline, after one run to warm up. With ``--tp`` it
is the largest rank's. **Time** is forward and backward apart, the slowest rank's, the median over the repetitions; a
repetition runs all rows one after another, so that noise hits them alike. **gradient** is the relative difference of
the two gradients' norms from the first row that ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A checkout runs without being installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENTROPY_COEF = 0.01
ROWS = {
    "full": "full fp32 logits, log_softmax",
    "megatron": "Megatron-Core, full logits",
    "megatron-fused": "Megatron-Core fused, full logits",
    "ours": "ours, logits made again",
    "ours-fused": "ours, head and loss fused",
    "ours-triton": "ours, made again, Triton",
    "ours-fused-triton": "ours, fused, Triton",
    "liger": "liger-kernel fused linear loss",
    "verl": "verl fused linear loss",
}
HAVE_ENTROPY = ("full", "ours", "ours-fused", "ours-triton", "ours-fused-triton", "verl")


def refusal(row: str, args: argparse.Namespace) -> str | None:
    """Why a row cannot run here; None where it can be tried."""
    from dcpo_megatron.mcore.head.backend import missing_for_triton

    package = {"liger": "liger_kernel", "verl": "verl"}.get(row)
    if args.entropy and row not in HAVE_ENTROPY:
        return "it has no entropy"
    if args.tp > 1 and row in ("full", "liger"):
        return "one rank only"
    if row.endswith("triton"):
        return missing_for_triton(args.device)
    if package and args.device != "cuda":
        return "it needs a GPU"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


# -- one measurement, in a process of its own ------------------------------------------------------


def make_row(row: str, args: argparse.Namespace, group):
    """``f(hidden, weight, targets) -> loss`` of one row."""
    import torch

    def total(logprobs, entropy):
        return -logprobs.mean() - (ENTROPY_COEF * entropy.mean() if args.entropy else 0.0)

    if row == "full":

        def full(hidden, weight, targets):
            logp = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
            entropy = -(logp.exp() * logp).sum(-1) if args.entropy else None
            return total(logp.gather(1, targets[:, None])[:, 0], entropy)

        return full
    if row in ("megatron", "megatron-fused"):
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        def megatron(hidden, weight, targets):
            logits = (hidden @ weight.t()).float()[:, None]
            if row == "megatron":
                return vocab_parallel_cross_entropy(logits, targets[:, None]).mean()
            return fused_vocab_parallel_cross_entropy(logits, targets[:, None], group).mean()

        return megatron
    if row.startswith("ours"):
        from dcpo_megatron.mcore.head.response_head import logprobs_from_hidden, loss_from_hidden

        head = "triton" if row.endswith("triton") else "torch"
        settings = dict(vocab=args.vocab, tensor_group=group, chunk_tokens=args.chunk_tokens, head=head)
        if "fused" not in row:
            return lambda hidden, weight, targets: total(
                *logprobs_from_hidden(hidden, weight, targets, chunk_vocab=args.chunk_vocab, **settings)
            )

        def fused(hidden, weight, targets):
            def token_loss(logprobs, entropy, part):
                return total(logprobs, entropy) * (logprobs.numel() / args.tokens)

            return loss_from_hidden(hidden, weight, targets, token_loss, **settings)[0]

        return fused
    if row == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, weight, targets: loss(weight, hidden, targets)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def verl(hidden, weight, targets):
        return total(*linear_cross_entropy(hidden, weight, targets, 1.0, "none", group if args.tp > 1 else None))

    return verl


def make_inputs(tokens: int, hidden: int, rows: int, vocab: int, dtype: str, device: str, rank: int):
    """Hidden states and targets, the same on every rank, and this rank's rows of the weight. Touched, so resident."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    kind = dict(dtype=getattr(torch, dtype), device=device, generator=generator)
    states = torch.randn(tokens, hidden, **kind).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
    generator.manual_seed(1 + rank)
    weight = torch.empty(rows, hidden, dtype=kind["dtype"], device=device)
    return states, weight.normal_(0, hidden**-0.5, generator=generator).requires_grad_(), targets


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def _reset_high_water_mark() -> None:
    """From here on VmHWM is the peak since now. Where the kernel refuses, it is the process's; building the inputs
    peaks at the inputs themselves."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError as error:
        print(f"VmHWM is not reset ({error})", file=sys.stderr)


def measure(row: str, args: argparse.Namespace) -> dict:
    """One row, once: ``{"forward": s, "backward": s, "extra": bytes, "loss": float, "norms": [of the gradients]}``."""
    import torch

    from dcpo_megatron.mcore import platform as platforms

    torch.set_num_threads(args.threads)
    platforms.start(platforms.select_platform(args.device))
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tp, create_gloo_process_groups=False)
    group = parallel_state.get_tensor_model_parallel_group()
    rank = parallel_state.get_tensor_model_parallel_rank()
    cuda = args.device == "cuda"

    def wait():
        if cuda:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    run = make_row(row, args, group)
    # Libraries start their threads and compile; a GPU's kernels are compiled for the real sizes.
    small = (args.tokens, args.vocab // args.tp) if cuda else (32, 64)
    warm_args = argparse.Namespace(**vars(args) | {"tokens": small[0], "vocab": small[1] * args.tp})
    warm = make_inputs(small[0], args.hidden, small[1], warm_args.vocab, args.dtype, args.device, rank)
    make_row(row, warm_args, group)(*warm).backward()
    del warm
    hidden, weight, targets = make_inputs(
        args.tokens, args.hidden, args.vocab // args.tp, args.vocab, args.dtype, args.device, rank
    )
    gradients = sum(t.numel() * t.element_size() for t in (hidden, weight))
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated() + gradients
    else:
        _reset_high_water_mark()
        baseline = _status_bytes("VmRSS") + gradients
    begin = time.perf_counter()
    loss = run(hidden, weight, targets)
    wait()
    middle = time.perf_counter()
    loss.backward()
    wait()
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if cuda else _status_bytes("VmHWM")
    norms = [float(torch.linalg.vector_norm(t.grad, dtype=torch.float64)) for t in (hidden, weight)]
    result = {"forward": middle - begin, "backward": end - middle, "extra": peak - baseline}
    return result | {"loss": float(loss.detach()), "norms": norms}


# -- all of them -----------------------------------------------------------------------------------


def measure_apart(row: str, args: argparse.Namespace, options: list[str]) -> dict:
    """:func:`measure` in ``args.tp`` fresh processes: the slowest time and the largest memory; ``{"skipped": reason}``
    where one of them failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(args.tp):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": args.tp,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            place |= {"OMP_NUM_THREADS": args.threads}
            command = [sys.executable, __file__, *options, "--measure", row, "--result", f"{folder}/{rank}.json"]
            environment = os.environ | {name: str(value) for name, value in place.items()}
            errors = open(f"{folder}/{rank}.err", "w+", encoding="utf-8")
            started.append((subprocess.Popen(command, env=environment, stdout=errors, stderr=errors), errors))
        found, deadline = [], time.monotonic() + args.timeout
        for rank, (process, errors) in enumerate(started):
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code == 0:
                found.append(json.loads(Path(f"{folder}/{rank}.json").read_text(encoding="utf-8")))
                continue
            for other, _ in started:
                other.kill()
                other.wait()
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["no message"]
            raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b", line)] or lines
            reasons = {None: f"no answer within {args.timeout:.0f} s", -9: "killed: not enough memory?"}
            found = [{"skipped": reasons.get(code, raised[-1][:160])}]
            break
        for _, errors in started:
            errors.close()
    if "skipped" in found[0]:
        return found[0]
    return found[0] | {name: max(rank[name] for rank in found) for name in ("forward", "backward", "extra")}


def summary(results: list[dict]) -> dict:
    """Medians of the times, the largest memory, over the repetitions of a row; or why it did not run."""
    failed = [result for result in results if "skipped" in result]
    if failed:
        return failed[0]
    times = {name: statistics.median(result[name] for result in results) for name in ("forward", "backward")}
    return results[0] | times | {"extra": max(result["extra"] for result in results)}


def progress(repeat: int, row: str, result: dict) -> str:
    """One measurement as a line."""
    if "skipped" in result:
        return f"{repeat + 1}. {row}: {result['skipped']}"
    seconds = f"{result['forward']:.3f} s forward, {result['backward']:.3f} s backward"
    return f"{repeat + 1}. {row}: {seconds}, {result['extra'] / 2**20:.0f} MiB"


def table(found: dict[str, dict]) -> str:
    """The measured rows as text; ratios are to the first one that ran."""
    head = (
        f"{'':50} {'peak extra':>12} {'ratio':>7} {'forward':>9} {'backward':>9} {'together':>9} {'ratio':>6}"
        f" {'gradient':>9}"
    )
    lines, base = [head], None
    for row, result in found.items():
        label = f"{row:18} {ROWS[row]}"[:50]
        if "skipped" in result:
            lines.append(f"{label:50} not run: {result['skipped']}")
            continue
        base = base or result
        together, of = result["forward"] + result["backward"], base["forward"] + base["backward"]
        apart = max(abs(a - b) / max(b, 1e-30) for a, b in zip(result["norms"], base["norms"], strict=True))
        lines.append(
            f"{label:50} {result['extra'] / 2**20:>8.0f} MiB {result['extra'] / max(base['extra'], 1):>7.3f}"
            f" {result['forward']:>7.2f} s {result['backward']:>7.2f} s {together:>7.2f} s {together / of:>6.2f}"
            f" {apart:>9.1e}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=int, default=1024, help="positions (default 1024)")
    made.add_argument("--hidden", type=int, default=512, help="hidden size (default 512)")
    made.add_argument("--vocab", type=int, default=32768, help="vocabulary, a multiple of tp (default 32768)")
    made.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, a process each (default 1)")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rows", default="all", help=f"comma-separated, of: {', '.join(ROWS)}")
    made.add_argument("--entropy", action="store_true", help="an entropy bonus with gradient is part of the loss")
    made.add_argument("--chunk-tokens", type=int, default=1024, help="model.head_chunk_tokens (default 1024)")
    made.add_argument("--chunk-vocab", type=int, default=None, help="vocabulary chunk of the recomputing head")
    made.add_argument("--threads", type=int, default=None, help="torch threads a rank (default: all cores / tp)")
    made.add_argument("--repeats", type=int, default=3, help="repetitions of all rows (default 3)")
    made.add_argument("--timeout", type=float, default=1800.0, help="seconds for one measurement (default 1800)")
    made.add_argument("--json", help="also write every measurement to this file")
    made.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    made.add_argument("--result", help=argparse.SUPPRESS)
    return made


def main(options: list[str] | None = None) -> int:
    options = sys.argv[1:] if options is None else options
    args = parser().parse_args(options)
    args.threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.tp)
    rows = list(ROWS) if args.rows == "all" else args.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown or args.vocab % args.tp:
        reason = (
            f"unknown row {unknown[0]!r}" if unknown else f"--vocab {args.vocab} is not a multiple of --tp {args.tp}"
        )
        print(f"bench_logprobs: error: {reason}; rows are: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    from dcpo_megatron.console.quiet import quiet_libraries

    quiet_libraries()
    if args.measure:
        Path(args.result).write_text(json.dumps(measure(args.measure, args)), encoding="utf-8")
        return 0
    import torch

    print(
        f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, tp {args.tp}, {args.dtype} on"
        f" {args.device}, torch {torch.__version__}, {args.threads} threads a rank, {args.repeats} repetitions"
        + (", with entropy" if args.entropy else "")
    )
    results: dict[str, list[dict]] = {row: [] for row in rows}
    for row in rows:
        if reason := refusal(row, args):
            results[row].append({"skipped": reason})
    facts = {name: getattr(args, name) for name in ("tokens", "hidden", "vocab", "tp", "dtype", "device", "threads")}
    facts |= {"torch": torch.__version__, "entropy": args.entropy}
    for repeat in range(args.repeats):
        for row in rows:
            if results[row] and "skipped" in results[row][-1]:
                continue
            results[row].append(measure_apart(row, args, options))
            # After each, here and in the file: a run that is ended leaves what it had.
            print(progress(repeat, row, results[row][-1]), file=sys.stderr, flush=True)
            if args.json:
                text = json.dumps({"settings": facts, "measurements": results}, indent=1)
                Path(args.json).write_text(text, encoding="utf-8")
    print(table({row: summary(measured) for row, measured in results.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
