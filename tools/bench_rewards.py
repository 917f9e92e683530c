#!/usr/bin/env python3
r"""What the mathematics reward says about answers to every row of prompt files, and how long it takes, beside math-verify's own bare call in the same run.

    python tools/bench_rewards.py math500.parquet aime_2024.parquet gsm8k_test.jsonl

**Answers.** ``gold``: ``\boxed{ground truth}``. ``respelled``: the same in another spelling (``\dfrac``, ``\left(``, spaces, commas in large integers). ``near``: the
last digit of the ground truth changed, or its sign where it has none; wrong. Rows with equal answer and ground truth are judged once by either.

**Columns.** right: answers judged right; for ``near`` that is an error. seconds and ms: all answers, and one of them; ours with its worker process's start left
out, math-verify in this process: ``verify(parse(gold), parse(answer))`` on the boxed texts with its default settings. failures: calls that raised or ran out of time.
differ: answers on which the two disagree; ``--show N`` prints that many of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.data.errors import DataError
from dcpo_megatron.data.formats import BadRow, find_schema, understand, wanted_columns
from dcpo_megatron.data.readers import read_table
from dcpo_megatron.rewards import MathJudge

ANSWERS = ("gold", "respelled", "near")


def ground_truths(file: str) -> list[str]:
    """Of every row of a file that has one. Raises DataError."""
    table = read_table(file, wanted_columns())
    schema = find_schema(table, "auto", None, None, "content")
    found = []
    for _, row in table.rows:
        try:
            found.append(understand(row, schema, table.path.stem).ground_truth)
        except BadRow:
            continue
    if not found:
        raise DataError(f"{file} has no row with a ground truth")
    return found


def respelled(gold: str) -> str:
    """Another spelling of the same answer."""
    if re.fullmatch(r"-?\d{4,}", gold):
        return f"{int(gold):,}"
    text = gold.replace(r"\dfrac", r"\tfrac").replace(r"\frac", r"\dfrac").replace(r"\mbox", r"\text")
    text = text.replace("(", r"\left( ").replace(")", r" \right)") if r"\left" not in text else text
    return text.replace("+", " + ")


def near_miss(gold: str) -> str:
    """A wrong answer that looks like the right one."""
    digits = list(re.finditer(r"\d", gold))
    if not digits:
        return "-" + gold if r"\text" not in gold else gold.replace(r"\text{", r"\text{not ")
    last = digits[-1]
    return gold[: last.start()] + str((int(last[0]) + 1) % 10) + gold[last.end() :]


def ours(pairs: list[tuple[str, str]], timeout: float, workers: int) -> tuple[list[bool], float, int]:
    """Verdicts, seconds, failures."""
    judge = MathJudge(workers)
    judge.start()
    try:
        started = time.perf_counter()
        outcomes = judge.judge([answer for answer, _ in pairs], [gold for _, gold in pairs], timeout)
        seconds = time.perf_counter() - started
    finally:
        judge.close()
    return [outcome.value == 1.0 for outcome in outcomes], seconds, sum(o.failure is not None for o in outcomes)


def bare(pairs: list[tuple[str, str]]) -> tuple[list[bool], float, int]:
    """The same by math-verify as its README calls it."""
    from math_verify import parse, verify

    logging.disable(logging.ERROR)
    parse("$1$")  # its tables
    verdicts, failures = [], 0
    started = time.perf_counter()
    for answer, gold in pairs:
        try:
            verdicts.append(bool(verify(parse(f"$\\boxed{{{gold}}}$"), parse(answer))))
        except Exception:  # what a bare call costs is part of the comparison
            verdicts.append(False)
            failures += 1
    return verdicts, time.perf_counter() - started, failures


def measure(file: str, kind: str, golds: list[str], timeout: float, workers: int) -> dict:
    """One row of the table."""
    make = {"gold": str, "respelled": respelled, "near": near_miss}[kind]
    pairs = [(f"The answer is $\\boxed{{{make(gold)}}}$.", gold) for gold in golds]
    distinct = list(dict.fromkeys(pairs))
    mine, seconds, failures = ours(distinct, timeout, workers)
    theirs, bare_seconds, bare_failures = bare(distinct)
    of = {pair: number for number, pair in enumerate(distinct)}
    places = [of[pair] for pair in pairs]
    return {
        "file": Path(file).stem,
        "answers": kind,
        "rows": len(pairs),
        "distinct": len(distinct),
        "right": sum(mine[place] for place in places),
        "seconds": seconds,
        "ms": 1000 * seconds / len(distinct),
        "failures": failures,
        "bare_right": sum(theirs[place] for place in places),
        "bare_seconds": bare_seconds,
        "bare_ms": 1000 * bare_seconds / len(distinct),
        "bare_failures": bare_failures,
        "differ": [
            {"answer": answer, "ground_truth": gold, "ours": a, "math_verify": b}
            for (answer, gold), a, b in zip(distinct, mine, theirs, strict=True)
            if a != b
        ],
    }


def table(rows: list[dict]) -> str:
    """For people."""
    lines = [
        "| file | answers | rows | distinct | ours right | ms | failures | math-verify right | ms | failures | differ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['file']} | {row['answers']} | {row['rows']:,} | {row['distinct']:,} | {row['right']:,} | {row['ms']:.2f} | {row['failures']} "
            f"| {row['bare_right']:,} | {row['bare_ms']:.2f} | {row['bare_failures']} | {len(row['differ'])} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="verl-style parquet, jsonl or GSM8K")
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=list(ANSWERS))
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes of ours (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N disagreements a row")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    try:
        golds = {file: ground_truths(file) for file in args.files}
    except DataError as error:
        print(f"bench_rewards: error: {error}", file=sys.stderr)
        return 2
    rows = [
        measure(file, kind, golds[file], args.timeout, args.workers) for file in args.files for kind in args.answers
    ]
    print(table(rows))
    for row in rows:
        for found in row["differ"][: args.show]:
            print(f"{row['file']} {row['answers']}: {found['answer']}  against  {found['ground_truth']}: ours {found['ours']}, math-verify {found['math_verify']}")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
