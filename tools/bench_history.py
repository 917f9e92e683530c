#!/usr/bin/env python3
"""What the reward history of SAS costs: its file, and one batch of rewards on several ranks beside the bare all-reduce
of the same table.

    python tools/bench_history.py
    python tools/bench_history.py --prompts 200000 --repeats 20 --json history.json

**file**: a history of ``--prompts`` prompts with ids of 20 bytes is saved and loaded ``--repeats`` times, at least
three. **observe**: ``--ranks`` processes meet by gloo, each with ``--batch`` prompts of its own and ``--group``
responses each, drawn from that history. A repetition measures, one after another behind a barrier,
``RewardHistory.observe`` and the all-reduce alone of the table of [ranks x batch, 5] float64 that it sends; the slowest
rank counts. **beside it** is the difference: ids, statistics, advantages and the gathers of ids. **processor** is the
processor time of a rank's main thread within observe. Limits are held against the best repetition, which is what the
work costs; the median is what it cost beside whatever else ran on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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

LIMITS = {"save": 2.0, "load": 2.0, "bytes": 100e6, "beside": 0.020}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Seconds and bytes of a reward history.")
    result.add_argument("--prompts", type=int, default=1_000_000, help="prompts in the history (default: %(default)s)")
    result.add_argument("--batch", type=int, default=512, help="prompts a rank observes (default: %(default)s)")
    result.add_argument("--group", type=int, default=16, help="responses a prompt (default: %(default)s)")
    result.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    result.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    result.add_argument("--json", metavar="FILE", help="also write the measurements here")
    result.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)
    return result


def prompt_id(number: int) -> str:
    return f"deepscaler/{number:09d}"


def made_history(prompts: int):
    """A history of ``prompts`` prompts with 1 to 8 visits of 16 rewards."""
    import torch

    from dcpo_megatron.advantages import RewardHistory

    generator = torch.Generator().manual_seed(0)
    visits = torch.randint(1, 9, (prompts,), generator=generator)
    history = RewardHistory()
    history.load_state_dict(
        {
            "version": 1,
            "std_ddof": 0,
            "prompt_ids": [prompt_id(number) for number in range(prompts)],
            "visits": visits,
            "counts": 16 * visits,
            "means": torch.rand(prompts, generator=generator, dtype=torch.float64),
            "m2": torch.rand(prompts, generator=generator, dtype=torch.float64),
        }
    )
    return history


def measure_file(folder: Path, args: argparse.Namespace) -> dict:
    from dcpo_megatron.advantages import RewardHistory
    from dcpo_megatron.advantages.sas_file import load_history, save_history

    history, path = made_history(args.prompts), folder / "history"
    seconds: dict[str, list[float]] = {"save": [], "load": []}
    for _ in range(max(3, args.repeats)):
        started = time.perf_counter()
        save_history(history, path)
        seconds["save"].append(time.perf_counter() - started)
        restored = RewardHistory()
        started = time.perf_counter()
        load_history(path, restored)
        seconds["load"].append(time.perf_counter() - started)
    return {**seconds, "bytes": path.stat().st_size}


def measure_rank(folder: Path, args: argparse.Namespace) -> None:
    """One rank's part: a list of [observe, all-reduce, processor time of observe] seconds, written to the folder."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    history = made_history(args.prompts)
    numbers = random.Random(0).sample(range(args.prompts), args.batch * world)
    mine = numbers[rank * args.batch : (rank + 1) * args.batch]
    ids = [prompt_id(number) for number in mine for _ in range(args.group)]
    generator = torch.Generator().manual_seed(rank)
    found = []
    for repeat in range(args.repeats + 1):
        rewards = torch.randint(-1, 2, (len(ids),), generator=generator).double()
        table = torch.rand(args.batch * world, 5, dtype=torch.float64)
        dist.barrier()
        started, own = time.perf_counter(), time.thread_time()
        history.observe(ids, rewards, dist.group.WORLD)
        observed, own = time.perf_counter() - started, time.thread_time() - own
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(table)
        reduced = time.perf_counter() - started
        if repeat:  # the first one warms up
            found.append([observed, reduced, own])
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_observe(folder: Path, args: argparse.Namespace) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(args.ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank-of", str(folder)]
    for name in ("prompts", "batch", "group", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(args.ranks)
    ]
    try:
        codes = [process.wait(600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise SystemExit(f"bench_history: a rank ended with {codes}: its message is above")
    of_ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(args.ranks)]
    slowest = [[max(values) for values in zip(*repeat, strict=True)] for repeat in zip(*of_ranks, strict=True)]
    return {
        "observe": [observed for observed, _, _ in slowest],
        "all_reduce": [reduced for _, reduced, _ in slowest],
        "beside": [observed - reduced for observed, reduced, _ in slowest],
        "processor": [own for _, _, own in slowest],
    }


def show(found: dict, args: argparse.Namespace) -> None:
    def line(name: str, values: list[float], limit: float | None = None) -> str:
        best, middle = min(values), statistics.median(values)
        text = f"{name:<34} {1e3 * best:>9.1f} {1e3 * middle:>9.1f}"
        return text + (
            "" if limit is None else f"  {1e3 * limit:>9.0f}  {'held' if min(values) <= limit else 'MISSED'}"
        )

    print(f"{'milliseconds':<34} {'best':>9} {'median':>9}  {'limit':>9}")
    print(line(f"save {args.prompts:,} prompts", found["save"], LIMITS["save"]))
    print(line("load them", found["load"], LIMITS["load"]))
    print(line(f"observe {args.batch} x {args.group} on each of {args.ranks}", found["observe"]))
    print(line("of which processor time", found["processor"]))
    print(line("the bare all-reduce of its table", found["all_reduce"]))
    print(line("beside it", found["beside"], LIMITS["beside"]))
    size = found["bytes"]
    print(f"the file: {size / 1e6:.1f} MB, {size / args.prompts:.0f} bytes a prompt; limit 100 MB: ", end="")
    print("held" if size <= LIMITS["bytes"] else "MISSED")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.batch * args.ranks > args.prompts:
        print("bench_history: error: --prompts must hold --batch prompts for each rank", file=sys.stderr)
        return 2
    if args.rank_of:
        measure_rank(Path(args.rank_of), args)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure_file(folder, args) | measure_observe(folder, args)
    show(found, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "measurements": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
