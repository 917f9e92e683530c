#!/usr/bin/env python3
"""How long training waits for a checkpoint: asynchronous saving beside synchronous saving of the same model in the same run.

    synchronous    |step|---------- copy, write, sync, index, name ----------|step|
    asynchronous   |step|copy|step (while threads write)|step|...

**delay** is what the step that starts a save takes longer than a step without one: the copy to the host, and what the writing slows the step itself down by. Kinds take
turns, so that noise meets all alike; medians are shown.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="tools/bench_save.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--ranks", type=int, default=2)
    result.add_argument("--hidden", type=int, default=512, help="width of the model")
    result.add_argument("--layers", type=int, default=8)
    result.add_argument("--vocab", type=int, default=8192)
    result.add_argument("--tokens", type=int, default=2048, help="tokens a rank trains on in one step")
    result.add_argument("--repeats", type=int, default=5)
    result.add_argument("--folder", type=Path, default=None, help="disk to write to (default: a temporary folder)")
    result.add_argument("--json", type=Path, default=None, metavar="FILE")
    return result


def bench_rank(args, folder: Path) -> None:
    """One rank: rank 0 leaves the numbers in ``folder/result.json``."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dcpo_megatron.mcore import platform as platforms
    from dcpo_megatron.mcore.batch import Sequence
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.mcore.training_state import take_snapshot
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.training.saver import CheckpointSaver
    from dcpo_megatron.weights.transfer import load_weights

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    platform = platforms.select_platform("auto")
    platforms.start(platform, 600)
    make_groups(ParallelLayout())
    hf, rank = folder / "hf", dist.get_rank()
    if rank == 0:
        config = Qwen2Config(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, max_position_embeddings=512, tie_word_embeddings=False,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(hf)
    dist.barrier()
    policy = PolicyModel.create(
        read_shape(hf), ParallelLayout(), ModelOptions(dtype="float32"), platform, rank_position()
    )
    load_weights(policy, hf)
    policy.make_trainable(OptimizerOptions())
    length = 128
    batch = [
        [
            Sequence(
                rank * 1000 + n, [1, 2], list(range(3, 3 + length)), 1.0, 1e-4, torch.zeros(length), torch.zeros(length)
            )
            for n in range(args.tokens // length)
        ]
    ]
    saver = CheckpointSaver(folder / "checkpoints", hf, keep_last=1, keep_every=0, device=platform.device, timeout=600)
    objective, number, times = (
        get_preset("dcpo-paper"),
        0,
        {"step": [], "synchronous": [], "asynchronous": [], "write": []},
    )

    def step() -> None:
        policy.update(batch, objective, 1e-6)

    def timed(action) -> float:
        dist.barrier()
        started = time.perf_counter()
        action()
        dist.barrier()
        return time.perf_counter() - started

    def save(wait: bool) -> None:
        nonlocal number
        number += 1
        saver.start(number, take_snapshot(policy), lambda work: None)
        if wait:
            check(saver.finish())
        step()

    def check(reports) -> None:
        problems = [report.problem for report in reports if report.problem]
        if problems:
            raise OSError(problems[0])
        times["write"] += [report.seconds for report in reports]

    step()
    save(wait=True)
    times["write"].clear()
    for _ in range(args.repeats):
        times["step"].append(timed(step))
        times["synchronous"].append(timed(lambda: save(wait=True)))
        times["step"].append(timed(step))
        times["asynchronous"].append(timed(lambda: save(wait=False)))
        check(saver.finish())
    if rank == 0:
        size = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())
        medians = {name: statistics.median(values) for name, values in times.items()}
        (folder / "result.json").write_text(json.dumps({"bytes": size, **medians}))
    platforms.stop()


def main() -> int:
    args = parser().parse_args()
    if "RANK" in os.environ:
        bench_rank(args, args.folder)
        return 0
    from rich.console import Console
    from rich.table import Table

    from dcpo_megatron.cli.launch import run_ranks
    from dcpo_megatron.cli.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [__file__, *sys.argv[1:], "--folder", folder]
        code = run_ranks(args.ranks, command) if args.ranks > 1 else _alone(args, Path(folder))
        if code:
            return code
        found = json.loads((Path(folder) / "result.json").read_text())
    step, whole = found["step"], found["synchronous"] - found["step"]
    rows = [
        ("a step without a save", step, None),
        ("synchronous save", found["synchronous"], whole),
        ("asynchronous save", found["asynchronous"], found["asynchronous"] - step),
    ]
    table = Table(title=f"{args.ranks} ranks, checkpoint of {found['bytes'] / 1e6:.0f} MB, medians of {args.repeats}")
    for name in ("what", "step, seconds", "delay, seconds", "delay / synchronous"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, seconds, delay in rows:
        table.add_row(
            name,
            f"{seconds:.3f}",
            "" if delay is None else f"{delay:.3f}",
            "" if delay is None else f"{delay / whole:.2f}",
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found | {"delay_ratio": (found["asynchronous"] - step) / whole}, indent=1))
    return 0


def _alone(args, folder: Path) -> int:
    bench_rank(args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
