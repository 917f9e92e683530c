#!/usr/bin/env python3
r"""The mathematics reward's verdicts on answers to rows of prompt files, and its time, beside math-verify's own call.

    python tools/bench_rewards.py math500.parquet aime_2024.parquet gsm8k_test.jsonl

**Answers.** ``gold``: the ground truth itself, right. ``respelled``: the same in another spelling (``\dfrac``,
``\left(``, spaces, commas in large integers), right. ``near``: the last digit of the ground truth changed, or its sign
where it has none; wrong. ``other``: another ground truth of the file; wrong, though two may be equal in another form.
``by hand``: a table of answers with the verdict wanted. Equal pairs are judged once by either and counted as often as
they occur.

**Columns.** wrong: verdicts that are not the wanted ones: first wrong answers judged right, then right ones judged
wrong. ms: of one answer, one call after the other; ours with its worker process started before, math-verify in this
process: ``verify(parse(gold), parse(answer))`` on the boxed texts with its default settings. The last column is the
ratio of the sums. ``--show N`` prints N of the wrong verdicts of each.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.data.errors import DataError
from dcpo_megatron.data.formats import BadRow, find_schema, understand, wanted_columns
from dcpo_megatron.data.readers import read_table
from dcpo_megatron.rewards import MathJudge

ANSWERS = ("gold", "respelled", "near", "other")
TABLE = Path(__file__).resolve().parents[1] / "tests/rewards/near_misses.tsv"


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


def another(golds: list[str]) -> dict[str, str]:
    """Of every ground truth a different one of the file."""
    distinct = sorted(set(golds))
    half = len(distinct) // 2
    return dict(zip(distinct, distinct[half:] + distinct[:half], strict=True))


Pair = tuple[str, str]  # answer, ground truth


class Times(NamedTuple):
    """Of one judge: its verdicts, milliseconds an answer, and calls that raised or ran out of time."""

    verdicts: list[bool]
    ms: list[float]
    failures: int


def ours(pairs: list[Pair], timeout: float) -> Times:
    """By the reward, one answer a call, its worker process started before."""
    judge = MathJudge()
    judge.start()
    found = Times([], [], 0)
    try:
        for answer, gold in pairs:
            started = time.perf_counter()
            (outcome,) = judge.judge([boxed(answer)], [gold], timeout)
            found.ms.append(1000 * (time.perf_counter() - started))
            found.verdicts.append(outcome.value == 1.0)
            found = found._replace(failures=found.failures + (outcome.failure is not None))
    finally:
        judge.close()
    return found


def bare(pairs: list[Pair]) -> Times:
    """By math-verify as its README calls it, in this process."""
    from math_verify import parse, verify

    logging.disable(logging.ERROR)
    verify(parse("$1+x$"), parse("$x+1$"))  # its tables
    found = Times([], [], 0)
    for answer, gold in pairs:
        started = time.perf_counter()
        try:
            verdict = bool(verify(parse(f"$\\boxed{{{gold}}}$"), parse(boxed(answer))))
        except Exception:  # what a bare call costs is part of the comparison
            verdict, found = False, found._replace(failures=found.failures + 1)
        found.ms.append(1000 * (time.perf_counter() - started))
        found.verdicts.append(verdict)
    return found


def boxed(answer: str) -> str:
    return f"The answer is $\\boxed{{{answer}}}$."


def measure(name: str, kind: str, wanted: dict[Pair, bool], rows: list[Pair], timeout: float) -> dict:
    """One row of the table: ``wanted`` is the verdict on each pair, ``rows`` are all of them, also repeated."""
    pairs = list(wanted)
    found = {"ours": ours(pairs, timeout), "math_verify": bare(pairs)}
    weight = Counter(rows)
    row = {"file": name, "answers": kind, "rows": len(rows), "distinct": len(pairs), "misjudged": {}}
    for judge, times in found.items():
        wrong = [pair for pair, verdict in zip(pairs, times.verdicts, strict=True) if verdict != wanted[pair]]
        row[judge] = {
            "too_good": sum(weight[pair] for pair in wrong if not wanted[pair]),
            "too_bad": sum(weight[pair] for pair in wrong if wanted[pair]),
            "median": statistics.median(times.ms),
            "p95": sorted(times.ms)[int(0.95 * (len(times.ms) - 1))],
            "worst": max(times.ms),
            "seconds": sum(times.ms) / 1000,
            "failures": times.failures,
        }
        row["misjudged"][judge] = [[*pair, wanted[pair]] for pair in wrong]
    return row


def from_file(file: str, kind: str, golds: list[str], timeout: float) -> dict:
    """Every ground truth of a prompt file with one kind of answer."""
    other = another(golds)
    make = {"gold": str, "respelled": respelled, "near": near_miss, "other": other.get}[kind]
    rows = [(make(gold), gold) for gold in golds]
    return measure(Path(file).stem, kind, dict.fromkeys(rows, kind in ("gold", "respelled")), rows, timeout)


def from_table(file: str, timeout: float) -> dict:
    """A table of kind, wanted reward, answer and ground truth with tabs between, like the tests'
    ``near_misses.tsv``."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    found = [line.split("\t") for line in lines if line and not line.startswith("#")]
    wanted = {(answer, gold): reward == "1" for _, reward, answer, gold in found}
    return measure(Path(file).stem, "by hand", wanted, list(wanted), timeout)


def table(rows: list[dict]) -> str:
    """For people."""
    lines = [
        (
            "| file | answers | rows | distinct | ours wrong: +1, 0 | ms median, p95, worst | math-verify wrong: +1, 0"
            " | ms median, p95, worst | math-verify's time / ours |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["file"], row["answers"], f"{row['rows']:,}", f"{row['distinct']:,}"]
        for judge in (row["ours"], row["math_verify"]):
            cells.append(f"{judge['too_good']}, {judge['too_bad']}")
            cells.append(f"{judge['median']:.2f}, {judge['p95']:.2f}, {judge['worst']:.0f}")
        cells.append(f"{row['math_verify']['seconds'] / row['ours']['seconds']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="verl-style parquet, jsonl or GSM8K")
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=list(ANSWERS))
    parser.add_argument(
        "--table",
        nargs="*",
        default=[str(TABLE)],
        metavar="FILE",
        help="tables of answers by hand (default: the tests')",
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N wrong verdicts a row and judge")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    try:
        golds = {file: ground_truths(file) for file in args.files}
    except DataError as error:
        print(f"bench_rewards: error: {error}", file=sys.stderr)
        return 2
    rows = [from_file(file, kind, golds[file], args.timeout) for file in args.files for kind in args.answers]
    rows += [from_table(file, args.timeout) for file in args.table]
    print(table(rows))
    for row in rows:
        for judge, wrong in row["misjudged"].items():
            for answer, gold, wanted in wrong[: args.show]:
                print(f"{row['file']} {row['answers']}: {answer}  against  {gold}: {judge} says {not wanted}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
