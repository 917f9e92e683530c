#!/usr/bin/env python3
"""How evenly responses are laid out over ranks and micro-batches, and how much of what is computed is padding, side by
side on the same lengths.

    python tools/bench_packing.py                         # lengths as reasoning traces have them
    python tools/bench_packing.py --gsm8k train.jsonl     # and those of GSM8K's solutions, from your copy of the file

**Lengths.** ``lognormal``: a prompt of ``--prompt`` tokens and a response of exp(N(ln median, sigma)) tokens, at most
``--max``. ``gsm8k``: question and solution of rows drawn at random, characters / 4 rounded up, or counted by
``--tokenizer FOLDER`` (a local Hugging Face folder).

**Rows.** ``packed``: the trainer's plan, sequences end to end. ``padded``: the trainer's plan with
``training.packing=padded``, one sequence a row. ``token-greedy``: ranks balanced by tokens (longest first to the rank
with the fewest), then first fit in arrival order into packed micro-batches. ``arrival``: ranks take equal shares in
arrival order, one sequence a row, as many rows as the budget takes.

**Columns.** padding: tokens computed / tokens that the responses have once each is rounded up to ``--align``, less 1; a
row is rounded up to ``--row-align`` besides (tensor-parallel ranks, with sequence parallelism), and a micro-batch
without responses computes one such unit. alignment: what that rounding adds. busiest rank: its cost (linear layers and
attention, 6 x ``--hidden`` tokens being the length at which the two are equal) / the least possible, which is the mean
of the responses' cost over ranks or the largest single response. costliest micro-batch: its cost / the mean of its
rank's, what a pipeline waits for. micro-batches: a rank's, and what total tokens / ranks / budget needs at least. plan:
seconds on this machine. Means over ``--draws`` minibatches; the two ratios are the worst of them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.data.packing import PackingOptions, cost, plan_micro_batches

Plan = list[list[list[int]]]
ROWS = ("packed", "padded", "token-greedy", "arrival")
IS_PACKED = {"packed": True, "padded": False, "token-greedy": True, "arrival": False}


# -- lengths ---------------------------------------------------------------------------------------


def lognormal_lengths(count: int, seed: int, *, median: float, sigma: float, longest: int, prompt: int) -> list[int]:
    """Prompt and response, in tokens."""
    draw = random.Random(seed)
    return [prompt + min(longest, max(1, round(draw.lognormvariate(math.log(median), sigma)))) for _ in range(count)]


def gsm8k_lengths(file: str, tokenizer: str | None) -> list[int]:
    """Question and solution of every row, in tokens. Raises OSError, ValueError or KeyError for another file."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [(row["question"], row["answer"]) for row in rows]
    if not texts:
        raise ValueError("it has no rows")
    if tokenizer is None:
        return [sum(-(-len(text) // 4) for text in pair) for pair in texts]
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return [sum(len(encode(text)["input_ids"]) for text in pair) for pair in texts]


# -- rows ------------------------------------------------------------------------------------------


def plan_row(row: str, lengths: Sequence[int], ranks: int, options: PackingOptions) -> Plan:
    """The plan of one row of the table; ``options.packed`` is the row's."""
    if row in ("packed", "padded"):
        return plan_micro_batches(lengths, ranks, options)
    sizes = [options.aligned(length) for length in lengths]
    plan = (_token_greedy if row == "token-greedy" else _arrival)(sizes, ranks, options.capacity)
    count = max(1, *(len(micro_batches) for micro_batches in plan))
    return [micro_batches + [[] for _ in range(count - len(micro_batches))] for micro_batches in plan]


def _token_greedy(sizes: list[int], ranks: int, budget: int) -> Plan:
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        shares[rank].append(index)
    plan: Plan = []
    for share in shares:
        bins, rooms = [], []
        for index in sorted(share):
            place = next((n for n, room in enumerate(rooms) if sizes[index] <= room), None)
            if place is None:
                place = len(bins)
                bins.append([])
                rooms.append(budget)
            bins[place].append(index)
            rooms[place] -= sizes[index]
        plan.append(bins)
    return plan


def _arrival(sizes: list[int], ranks: int, budget: int) -> Plan:
    plan: Plan = []
    for rank in range(ranks):
        batches: list[list[int]] = []
        longest = 0
        for index in range(len(sizes) * rank // ranks, len(sizes) * (rank + 1) // ranks):
            longest = max(longest, sizes[index])
            if batches and (len(batches[-1]) + 1) * longest <= budget:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = sizes[index]
        plan.append(batches)
    return plan


# -- measures --------------------------------------------------------------------------------------


def tokens_computed(members: Sequence[int], lengths: Sequence[int], options: PackingOptions) -> int:
    """Tokens of one micro-batch as the model sees it, padding included."""
    sizes = [options.aligned(lengths[i]) for i in members] or [options.align]
    row = sum(sizes) if options.packed else max(sizes)
    return -(-row // options.row_align) * options.row_align * (1 if options.packed else len(sizes))


def measure(plan: Plan, lengths: Sequence[int], options: PackingOptions) -> dict[str, float]:
    """The columns of the table, but for the seconds. ``padding`` is a share; ``busiest_rank`` and
    ``costliest_micro_batch`` are ratios, 1 at best."""

    def micro_batch_cost(members: Sequence[int]) -> float:
        costs = [cost(options.aligned(lengths[i]), options) for i in members]
        return sum(costs) if options.packed else len(costs) * max(costs, default=0.0)

    real = sum(options.aligned(length) for length in lengths)
    computed = sum(tokens_computed(members, lengths, options) for rank in plan for members in rank)
    single = [cost(options.aligned(length), options) for length in lengths]
    ranks = [[micro_batch_cost(members) for members in micro_batches] for micro_batches in plan]
    return {
        "padding": computed / real - 1,
        "alignment": real / sum(lengths) - 1,
        "busiest_rank": max(map(sum, ranks)) / max(sum(single) / len(plan), max(single)),
        "costliest_micro_batch": max(max(costs) * len(costs) / sum(costs) for costs in ranks if sum(costs)),
        "micro_batches": len(plan[0]),
        "lower_bound": math.ceil(real / len(plan) / options.max_tokens),
    }


def bench(
    draws: Sequence[Sequence[int]], ranks: int, budget: int, align: int, row_align: int, hidden: int
) -> dict[str, dict[str, float]]:
    """Every row on the same minibatches: means, and for the two ratios the worst."""
    found: dict[str, dict[str, float]] = {}
    for row in ROWS:
        options = PackingOptions(budget, IS_PACKED[row], align, 6 * hidden, row_align)
        measured = []
        for lengths in draws:
            started = time.perf_counter()
            plan = plan_row(row, lengths, ranks, options)
            seconds = time.perf_counter() - started
            measured.append(measure(plan, lengths, options) | {"plan_seconds": seconds})
        found[row] = {
            name: (max if name in ("busiest_rank", "costliest_micro_batch") else _mean)([m[name] for m in measured])
            for name in measured[0]
        }
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# -- command ---------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ranks", type=int, default=8, help="data-parallel ranks (default 8)")
    made.add_argument(
        "--responses", default="128,512,8192", help="of a minibatch, separated by commas (default %(default)s)"
    )
    made.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch (default 16384)")
    made.add_argument(
        "--align", type=int, default=1, help="tokens that every sequence is rounded up to a multiple of (default 1)"
    )
    made.add_argument(
        "--row-align", type=int, default=1, help="tokens that a row is rounded up to a multiple of (default 1)"
    )
    made.add_argument("--hidden", type=int, default=1536, help="hidden size, for the cost of attention (default 1536)")
    made.add_argument("--draws", type=int, default=5, help="minibatches (default 5)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--median", type=float, default=1200, help="of the log-normal responses, in tokens (default 1200)"
    )
    made.add_argument("--sigma", type=float, default=0.8, help="of their logarithm (default 0.8)")
    made.add_argument("--max", type=int, default=8192, dest="longest", help="longest of them (default 8192)")
    made.add_argument("--prompt", type=int, default=150, help="tokens of their prompts (default 150)")
    made.add_argument(
        "--gsm8k", metavar="FILE", help="GSM8K's jsonl file (question, answer); without it these rows are left out"
    )
    made.add_argument("--tokenizer", metavar="FOLDER", help="counts GSM8K's tokens; default: characters / 4")
    made.add_argument("--json", metavar="FILE", help="also write every number to this file")
    return made


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "lengths", "layout", "padding", "alignment", "busiest rank", "costliest micro-batch", "micro-batches", "plan"
    )
    for name, rows in found.items():
        for row, m in rows.items():
            table.add_row(
                name if row == ROWS[0] else "", row, f"{m['padding']:.2%}", f"{m['alignment']:.2%}",
                f"{m['busiest_rank']:.4f}", f"{m['costliest_micro_batch']:.3f}",
                f"{m['micro_batches']:.1f} / {m['lower_bound']:.1f}", f"{m['plan_seconds'] * 1e3:.1f} ms",
            )  # fmt: skip
        table.add_section()
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        counts = [int(word) for word in args.responses.split(",")]
    except ValueError:
        counts = [0]
    low = [
        name
        for name in ("ranks", "budget", "align", "row_align", "hidden", "draws", "longest")
        if getattr(args, name) < 1
    ]
    if low or min(counts) < 1 or args.median <= 0 or args.sigma < 0 or args.prompt < 0:
        name = low[0] if low else "responses" if min(counts) < 1 else "median, --sigma or --prompt"
        print(
            f"bench_packing: error: --{name.replace('longest', 'max').replace('_', '-')} is out of range",
            file=sys.stderr,
        )
        return 2
    solutions = None
    if args.gsm8k:
        try:
            solutions = gsm8k_lengths(args.gsm8k, args.tokenizer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"bench_packing: error: --gsm8k {args.gsm8k}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
    found = {}
    for count in counts:
        draws = [
            lognormal_lengths(
                count, args.seed + n, median=args.median, sigma=args.sigma, longest=args.longest, prompt=args.prompt
            )
            for n in range(args.draws)
        ]
        found[f"lognormal, {count}"] = bench(draws, args.ranks, args.budget, args.align, args.row_align, args.hidden)
        if solutions:
            draws = [random.Random(args.seed + n).choices(solutions, k=count) for n in range(args.draws)]
            found[f"gsm8k, {count}"] = bench(draws, args.ranks, args.budget, args.align, args.row_align, args.hidden)
    print(
        f"{args.ranks} data-parallel ranks, budget {args.budget} tokens, align {args.align}, row align"
        f" {args.row_align}, hidden {args.hidden}, {args.draws} minibatches a row, seed {args.seed}; log-normal"
        f" responses: median {args.median:g}, sigma {args.sigma:g}, at most {args.longest} tokens, prompts of"
        f" {args.prompt}"
    )
    show(found)
    if solutions is None:
        print(
            "gsm8k: not run: give the file of GSM8K's problems, one JSON object with question and answer a line, as"
            " --gsm8k FILE.jsonl"
        )
    else:
        print(
            f"gsm8k: {len(solutions)} solutions,"
            f" {'characters / 4' if args.tokenizer is None else 'tokens of ' + args.tokenizer}"
        )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"settings": vars(args), "found": found}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
