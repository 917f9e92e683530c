#!/usr/bin/env python3
"""From judged responses to each rank's micro-batches: everything to everybody, beside the table and the rank's share.

    everything    every rank gathers every response, decodes them into lists of Python numbers, plans, takes its part
    share         ranks gather the table alone, plan, and receive the tokens that they train on (what a run does)

Data-parallel ranks are processes over gloo. What they do together (messages) is timed with all of them at it; what each
does alone (decoding, planning, tensors) in turns, as if each had a core for itself; both are added, of the slowest
rank. **received**: bytes that came from other ranks, counted at the collectives. **share**: 8 bytes (token id,
log-prob) for each token that the rank trains on. **peak**: the most memory above what the rank held before, its own
responses among that. Responses have between half and one and a half times ``--tokens`` tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

# A checkout runs without being installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = ("everything", "share")


def make_table(responses: int, tokens: int, ranks: int, group_size: int = 16):
    """A table as a rollout batch of ``responses`` gives it, held in equal slices; the same everywhere."""
    import numpy as np

    from dcpo_megatron.data import Prompt, ResponseTable

    draw = np.random.default_rng(0)
    prompts = [Prompt(f"p{n}", tuple(range(1, 101)), "", "", "") for n in range(-(-responses // group_size))]
    row = np.arange(responses)
    return ResponseTable(
        prompts, row // group_size, row % group_size, draw.integers(tokens // 2, tokens + tokens // 2 + 1, responses),
        np.zeros(responses, dtype=np.int64), draw.random(responses), draw.standard_normal(responses),
        np.ones(responses, dtype=bool), row * ranks // responses,
    )  # fmt: skip


def make_held(table, rank: int):
    """The responses of ``rank``, with tokens of its own."""
    import numpy as np

    from dcpo_megatron.data import Response

    draw, found = np.random.default_rng(rank), []
    for row in np.flatnonzero(table.holder == rank):
        tokens, prompt = int(table.length[row]), table.prompts[table.prompt[row]]
        found.append(
            Response(
                prompt.id, np.array(prompt.token_ids, dtype=np.int32), "1", int(table.sample[row]),
                draw.integers(0, 150_000, tokens, dtype=np.int32), -draw.random(tokens, dtype=np.float32), "stop",
                np.zeros(tokens, dtype=np.int64), "x" * (3 * tokens), reward=float(table.reward[row]),
                advantage=float(table.advantage[row]), correct=True,
            )
        )  # fmt: skip
    return found


def make_maker(ranks: int, rank: int):
    """The part of a trainer that makes minibatches: 32 prompts each, micro-batches of 16,384 tokens."""
    from dcpo_megatron.data.packing import PackingOptions
    from dcpo_megatron.monitor.timeline import Timeline
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.training.minibatches import MinibatchMaker

    return MinibatchMaker(
        get_preset("dcpo-paper"), PackingOptions(16384), 32, 1 << 20, 1, rank, tuple(range(ranks)), Timeline()
    )


class Received:
    """Counts the bytes that collectives bring from other ranks."""

    def __init__(self):
        import torch.distributed as dist

        self.bytes, gather, to_all = 0, dist.all_gather, dist.all_to_all_single
        rank = dist.get_rank()

        def all_gather(outputs, mine, *args, **kwargs):
            self.bytes += sum(t.nbytes for place, t in enumerate(outputs) if place != rank)
            return gather(outputs, mine, *args, **kwargs)

        def all_to_all_single(output, mine, from_each, *args, **kwargs):
            self.bytes += output.nbytes - from_each[rank] * output.element_size()
            return to_all(output, mine, from_each, *args, **kwargs)

        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single


class Clock:
    """Seconds of one rank: :meth:`together` times what all do at once, :meth:`alone` what each does in its turn."""

    def __init__(self):
        self.seconds = {"together": 0.0, "alone": 0.0}

    def together(self, work, *args):
        import torch.distributed as dist

        dist.barrier()
        return self._time("together", work, *args)

    def alone(self, work, *args):
        import torch.distributed as dist

        result = None
        for turn in range(dist.get_world_size()):
            dist.barrier()
            if turn == dist.get_rank():
                result = self._time("alone", work, *args)
        return result

    def _time(self, kind, work, *args):
        begin = time.perf_counter()
        result = work(*args)
        self.seconds[kind] += time.perf_counter() - begin
        return result


def everything(held, prompts, maker, clock) -> list:
    """Everything to everybody; a rank lets go of the lists when its turn is over."""
    import numpy as np

    from dcpo_megatron.data import decode_responses, encode_responses
    from dcpo_megatron.data.response_table import rows_of, table_of
    from dcpo_megatron.distributed import CPU, all_gather_bytes, host_group

    payloads = clock.together(all_gather_bytes, clock.alone(encode_responses, held), host_group(), CPU)

    def local():
        parts = [decode_responses(payload) for payload in payloads]
        lists = [
            (r.token_ids.tolist(), r.rollout_logprobs.tolist(), r.weight_versions.tolist())
            for part in parts
            for r in part
        ]
        table = table_of(prompts, [rows_of(part, prompts, 0) for part in parts])
        plan = maker.plan(table)
        mine = [row for rows in plan.micro_batches for micro_batch in rows for row in micro_batch]
        tokens = {
            row: (np.array(lists[row][0], dtype=np.int32), np.array(lists[row][1], dtype=np.float32)) for row in mine
        }
        return maker.sequences(table, plan, tokens)

    return clock.alone(local)


def share(held, prompts, maker, clock) -> list:
    """As a run does it (:meth:`MinibatchMaker.make`), its parts timed apart."""
    from dcpo_megatron.distributed import host_group
    from dcpo_megatron.training.exchange import exchange_table, exchange_tokens

    table = clock.together(exchange_table, held, prompts, 0, host_group())
    plan = clock.alone(maker.plan, table)
    tokens = clock.together(exchange_tokens, table, held, plan.trained_by, maker.data_ranks, host_group())
    return clock.alone(maker.sequences, table, plan, tokens)


def measure(way: str, responses: int, tokens: int) -> dict:
    """One rank, once: seconds, bytes received, its share, peak memory, and a checksum of what it has at the end."""
    import torch.distributed as dist

    from tools.bench_logprobs import _reset_high_water_mark, _status_bytes

    rank, ranks = dist.get_rank(), dist.get_world_size()
    received, clock, maker = Received(), Clock(), make_maker(ranks, rank)
    table = make_table(responses, tokens, ranks)
    held = make_held(table, rank)
    dist.barrier()
    _reset_high_water_mark()
    before, came = _status_bytes("VmRSS"), received.bytes
    made = (everything if way == "everything" else share)(held, table.prompts, maker, clock)
    peak, came = _status_bytes("VmHWM") - before, received.bytes - came
    trained = [s for minibatch in made for micro_batch in minibatch for s in micro_batch]
    sums = [
        int(s.response_ids.sum(dtype="int64")) * (s.number + 1) + float(s.rollout_logprobs.double().sum())
        for s in trained
    ]
    return {
        "seconds": sum(clock.seconds.values()), **clock.seconds, "received": came, "peak": peak,
        "share": 8 * sum(len(s.response_ids) for s in trained), "checksum": sum(sums),
    }  # fmt: skip


def bench(responses: int, tokens: int, ranks: int, repeats: int, timeout: float) -> dict[str, dict]:
    """Both ways in turns: medians of the seconds of the slowest rank, the largest of everything else."""
    from dcpo_megatron.verification.ranks import RankPool

    found: dict[str, list[list[dict]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            with RankPool(ranks, python_path=[str(ROOT)]) as pool:
                found[way].append(
                    pool.run("tools.bench_exchange:measure", ranks, way, responses, tokens, timeout=timeout)
                )
    results = {}
    for way, runs in found.items():
        largest = {name: max(rank[name] for run in runs for rank in run) for name in ("received", "peak", "share")}
        seconds = {
            name: statistics.median(max(rank[name] for rank in run) for run in runs)
            for name in ("seconds", "together", "alone")
        }
        results[way] = seconds | largest | {"checksums": [rank["checksum"] for rank in runs[0]]}
    if results["everything"]["checksums"] != results["share"]["checksums"]:
        raise RuntimeError("the two ways gave ranks other tokens: a bug in one of them")
    return results


def plan_only(responses: int, tokens: int, ranks: int) -> float:
    """Seconds that one rank takes to plan a step for ``ranks`` data-parallel ranks."""
    table, maker = make_table(responses, tokens, ranks), make_maker(ranks, 0)
    maker.prompts = len(table.prompts)  # one minibatch: every rank has responses
    begin = time.perf_counter()
    maker.plan(table)
    return time.perf_counter() - begin


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tools/bench_exchange.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--responses", type=int, default=1024, help="of the batch (default %(default)s)")
    made.add_argument("--tokens", type=int, default=1000, help="of a response, on average (default %(default)s)")
    made.add_argument("--ranks", default="1,2,4", help="data-parallel ranks, separated by commas (default %(default)s)")
    made.add_argument("--repeats", type=int, default=1, help="of each way, in turns (default %(default)s)")
    made.add_argument("--plan-only", action="store_true", help="time the planner alone, on one core, for any --ranks")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds for one measurement (default 900)")
    made.add_argument("--json", metavar="FILE", help="also write every number to this file")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        counts = [int(word) for word in args.ranks.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or min(args.responses, args.tokens, args.repeats) < 1:
        print("bench_exchange: error: --responses, --tokens, --ranks and --repeats are whole numbers from 1 on",
              file=sys.stderr)  # fmt: skip
        return 2
    from dcpo_megatron.console.quiet import quiet_libraries

    quiet_libraries()
    print(f"{args.responses} responses of {args.tokens} tokens on average")
    found: dict[int, dict] = {}
    for ranks in counts:
        if args.plan_only:
            found[ranks] = {"plan": plan_only(args.responses, args.tokens, ranks)}
            print(f"plan for {ranks} data-parallel ranks: {found[ranks]['plan']:.2f} s", flush=True)
            continue
        found[ranks] = bench(args.responses, args.tokens, ranks, args.repeats, args.timeout)
        if ranks == counts[0]:
            print(f"{'ranks':>5}  {'way':10} {'seconds':>9} {'ratio':>6} {'together':>9} {'alone':>8}"
                  f" {'received':>11} {'of share':>9} {'peak':>10} {'ratio':>6}")  # fmt: skip
        base = found[ranks]["everything"]
        for way, row in found[ranks].items():
            print(
                f"{ranks:>5}  {way:10} {row['seconds']:>7.2f} s {row['seconds'] / base['seconds']:>6.2f}"
                f" {row['together']:>7.2f} s {row['alone']:>6.2f} s {row['received'] / 2**20:>7.1f} MiB"
                f" {row['received'] / row['share']:>9.2f} {row['peak'] / 2**20:>6.0f} MiB"
                f" {row['peak'] / max(base['peak'], 1):>6.2f}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "measurements": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
