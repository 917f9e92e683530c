#!/usr/bin/env python3
"""How long training waits for a checkpoint: asynchronous saving beside synchronous saving of the same model in the same
run.

    synchronous    |step|---------- copy, write, sync, index, name ----------|step|
    asynchronous   |step|copy|step (while threads write)|step (while threads write)|...|index, name|step|

**delay** is what the step that starts a save takes longer than the steps before and after it: the copy to the host, and
what the writing slows the step itself down by. **delay, all steps** adds what the further steps take longer that are
trained until the save is complete, and its last part. Kinds take turns, so that noise meets all alike; medians are
shown. **written after**: from the start of the save to its final name, which an asynchronous one gets at the end of a
step.
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
    result.add_argument("--tokens", type=int, default=512, help="tokens a rank trains on in one step")
    result.add_argument("--repeats", type=int, default=5)
    result.add_argument("--folder", type=Path, default=None, help="disk to write to (default: a temporary folder)")
    result.add_argument("--json", type=Path, default=None, metavar="FILE")
    return result


def bench_rank(args, folder: Path) -> None:
    """One rank: rank 0 leaves the numbers in ``folder/result.json``."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dcpo_megatron.console.quiet import quiet_libraries

    quiet_libraries()
    from dcpo_megatron.checkpoint.saver import CheckpointSaver
    from dcpo_megatron.checkpoint.snapshot import take_snapshot
    from dcpo_megatron.mcore import platform as platforms
    from dcpo_megatron.mcore.batch import TrainingSample
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.weights.transfer import load_weights

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    platform = platforms.select_platform("auto")
    platforms.start(platform, 600)
    make_groups(ParallelLayout())
    hf, rank = folder / "hf", dist.get_rank()
    if rank == 0:
        config = Qwen2Config(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, max_position_embeddings=512,
            tie_word_embeddings=False,
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
            TrainingSample(
                rank * 1000 + n, [1, 2], list(range(3, 3 + length)), 1.0, 1e-4, torch.zeros(length), torch.zeros(length)
            )
            for n in range(args.tokens // length)
        ]
    ]
    saver = CheckpointSaver(folder / "checkpoints", hf, keep_last=1, keep_every=0, timeout=600, device=platform.device)
    objective, number, times = (
        get_preset("dcpo-paper"),
        0,
        {
            "step": [],
            "synchronous": [],
            "asynchronous": [],
            "written synchronous": [],
            "written asynchronous": [],
            "further": [],
        },
    )

    def step() -> None:
        policy.update(batch, objective, 1e-6)

    def timed(action) -> float:
        dist.barrier()
        started = time.perf_counter()
        action()
        dist.barrier()
        return time.perf_counter() - started

    def save(kind: str) -> None:
        nonlocal number
        number += 1
        alone = kind == "synchronous"
        saver.start(number, take_snapshot(policy, saver.memory), lambda work: None, beside_training=not alone)
        if alone:
            check(kind, saver.finish())
        step()

    def check(kind: str, reports) -> None:
        for report in reports:
            if report.problem:
                raise OSError(report.problem)
            times["written " + kind].append(report.seconds)

    def further_step() -> None:
        check("asynchronous", saver.poll()[0])
        if saver.busy:
            step()

    step()
    save("synchronous")
    times["written synchronous"].clear()
    for _ in range(args.repeats):
        times["step"].append(timed(step))
        times["synchronous"].append(timed(lambda: save("synchronous")))
        times["step"].append(timed(step))
        times["asynchronous"].append(timed(lambda: save("asynchronous")))
        further = []
        while saver.busy:
            further.append(timed(further_step))
        times["further"].append(further)
    times["step"].append(timed(step))
    if rank == 0:
        size = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())
        (folder / "result.json").write_text(json.dumps({"bytes": size, **times}))
    platforms.stop()


def main() -> int:
    args = parser().parse_args()
    if "RANK" in os.environ:
        bench_rank(args, args.folder)
        return 0
    from rich.console import Console
    from rich.table import Table

    from dcpo_megatron.console.quiet import quiet_libraries
    from dcpo_megatron.launch.local import run_ranks

    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [__file__, *sys.argv[1:], "--folder", folder]
        code = run_ranks(args.ranks, command) if args.ranks > 1 else _alone(args, Path(folder))
        if code:
            return code
        found = json.loads((Path(folder) / "result.json").read_text())
    delays = delays_of(found)
    all_steps = {"synchronous": delays["synchronous"], "asynchronous": all_delays_of(found)}
    table = Table(title=f"{args.ranks} ranks, checkpoint of {found['bytes'] / 1e6:.0f} MB, medians of {args.repeats}")
    heads = ("what", "step, seconds", "delay, seconds (least to most)", "ratio", "delay, all steps", "written after")
    for name in heads:
        table.add_column(name, justify="left" if name == "what" else "right")
    table.add_row("a step without a save", f"{statistics.median(found['step']):.3f}")
    for name, values in delays.items():
        table.add_row(
            f"{name} save",
            f"{statistics.median(found[name]):.3f}",
            f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})",
            f"{statistics.median(values) / statistics.median(delays['synchronous']):.2f}",
            f"{statistics.median(all_steps[name]):.3f}",
            f"{statistics.median(found['written ' + name]):.3f} s",
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    if args.json:
        ratio = statistics.median(delays["asynchronous"]) / statistics.median(delays["synchronous"])
        args.json.write_text(
            json.dumps(found | {"delays": delays, "delays_of_all_steps": all_steps, "delay_ratio": ratio}, indent=1)
        )
    return 0


def delays_of(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """By kind: what each step with a save took longer than the mean of the steps before and after it, in seconds."""
    steps = found["step"]
    return {
        kind: [
            seconds - (steps[2 * number + first] + steps[2 * number + first + 1]) / 2
            for number, seconds in enumerate(found[kind])
        ]
        for first, kind in enumerate(("synchronous", "asynchronous"))
    }


def all_delays_of(found: dict[str, list]) -> list[float]:
    """What each asynchronous save delayed its first step and the further ones by, in seconds; the last of the further
    ones is no step but index and name."""
    plain = statistics.median(found["step"])
    first = delays_of(found)["asynchronous"]
    return [
        delay + sum(further) - plain * (len(further) - 1)
        for delay, further in zip(first, found["further"], strict=True)
    ]


def _alone(args, folder: Path) -> int:
    bench_rank(args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
