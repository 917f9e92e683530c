#!/usr/bin/env python3
"""Where the seconds of a training step go: a table, and a trace that chrome://tracing and Perfetto open.

    python tools/bench_step.py                                 # the demo's recipe on a small model made and warmed up
                                                               # first: two ranks on a CPU, minutes
    python tools/bench_step.py --trace step.json               # and a trace, one track a rank
    python tools/bench_step.py --ranks 8 --config recipe.yaml model.path=/path/to/model 'data.files=[train.parquet]'
    python tools/bench_step.py --ranks 1 --shape qwen2.5-0.5b  # a model of that shape with random weights, made on the
                                                               # spot; a GPU
    python tools/bench_step.py --ranks 1 --shape qwen2.5-0.5b --server-python .venv-sglang/bin/python \\
        publish.mode=ipc publish.colocated=true

It runs real steps of the trainer, as ``dcpo train`` does with the same files and overrides, without evaluation and
without writing a model. The first ``--warm-up`` steps are left out. **mean** is over the ``--steps`` steps after them
and over all ranks, **slowest rank** is the largest mean of one rank. Parts are disjoint: what runs inside a part and
has a name of its own is taken out of it, so they add up to the step. ``rest`` is what has no name, ``logging`` the
metrics' files after the step. Times are the host's; on a GPU, launched work counts where the host waits for it.

``--shape`` has prompts of arithmetic, responses that go on to their limit (256 responses of 512 tokens a step;
overrides change it), and rewards that are a coin's. With ``--server-python`` a SGLang server of that model samples, on
the trainer's GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

# A checkout runs without being installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dcpo_megatron.console.quiet import quiet_libraries  # noqa: E402

RECIPE = ROOT / "examples" / "configs" / "demo.yaml"
ROLLOUT = ("rollout", "rollout_wait")
MODEL = ("old_logprobs", "forward_backward", "optimizer")
# The sizes of published config.json files; "tiny" is for tests.
_QWEN = dict(vocab_size=151936, num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)
SHAPES = {
    "qwen2.5-0.5b": _QWEN | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "qwen2.5-1.5b": (
        _QWEN | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    ),
    "tiny": (
        _QWEN | dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    ),
}
SHAPE_RECIPE = [
    "data.template=plain", "data.max_prompt_tokens=16", "rollout.prompts_per_step=32", "rollout.group_size=8",
    "rollout.max_response_tokens=512",
    "training.minibatch_prompts=16", "training.micro_batch_tokens=16384", "logging.tensorboard=false",
    "checkpoint.every=0",
]  # fmt: skip
PARTS = {
    "rollout": "sampling",
    "rollout_wait": "until every rank has sampled and judged",
    "reward": "texts and rewards",
    "advantage": "advantages, exchange of responses",
    "packing": "plan of micro-batches, their tensors",
    "old_logprobs": "forward passes for old log-probs",
    "forward_backward": "of the updates, gradients reduced",
    "optimizer": "clipping and step",
    "publish": "new weights to the rollout engine",
    "rest": "everything else of the step",
    "logging": "metrics written after the step",
}


_coins = random.Random(0)


def coin(response: str, ground_truth: str) -> float:
    """The reward of ``--shape``: random weights say nothing that could be judged, and equal rewards would leave nothing
    to train on."""
    return float(_coins.random() < 0.5)


# -- one rank --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> int:
    """Runs one rank's steps and writes ``rank-R.json``: seconds by part of every step, and events where a trace was
    asked for."""
    from dcpo_megatron.cli.train import is_bad_input, refuse

    quiet_libraries()
    try:
        found = _run_steps(args)
    except Exception as error:
        if not is_bad_input(error):
            raise
        return refuse(error)
    rank = int(os.environ.get("RANK", "0"))
    (Path(args.measure) / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def _run_steps(args: argparse.Namespace) -> dict:
    from dcpo_megatron.config.loading import load_config
    from dcpo_megatron.training.checks import check_run

    run = check_run(load_config(args.config, args.overrides), int(os.environ.get("WORLD_SIZE", "1")))
    import torch

    if run.platform.is_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    from dcpo_megatron.training.build import build_trainer

    trainer = build_trainer(run)
    timeline = trainer.monitors.timeline
    steps, rest = [], dict.fromkeys(PARTS, 0.0)
    try:
        for step in range(1, args.warm_up + args.steps + 1):
            if args.trace and step == args.warm_up + 1:
                timeline.events = []
            started = time.perf_counter()
            metrics = trainer.step(step)
            with timeline.span("logging"):
                trainer.monitors.sinks.step(step, metrics)
            wall = time.perf_counter() - started
            parts = {name: metrics[f"seconds_{name}"] for name in PARTS if name != "logging"}
            if step > args.warm_up:
                steps.append(rest | parts | timeline.take() | {"wall": wall})
            else:
                timeline.take()
    except BaseException:
        # Not the process groups: another rank may be in a collective that this one will not join.
        trainer.close(groups=False)
        raise
    events = timeline.events or []
    trainer.close()
    return {"steps": steps, "events": events}


# -- all of them -----------------------------------------------------------------------------------


def summary(ranks: list[dict]) -> dict[str, dict[str, float]]:
    """By part: ``mean`` seconds over steps and ranks, ``share`` of the step, ``slowest_rank``'s mean; and the row
    ``step`` with their sums."""

    def mean(rank: dict, name: str) -> float:
        return math.fsum(step[name] for step in rank["steps"]) / len(rank["steps"])

    means = {name: [mean(rank, name) for rank in ranks] for name in PARTS}
    together = math.fsum(math.fsum(found) for found in means.values()) / len(ranks)
    rows = {
        name: {
            "mean": math.fsum(found) / len(ranks),
            "share": math.fsum(found) / len(ranks) / together,
            "slowest_rank": max(found),
        }
        for name, found in means.items()
    }
    totals = [math.fsum(found[rank] for found in means.values()) for rank in range(len(ranks))]
    rows["step"] = {"mean": together, "share": 1.0, "slowest_rank": max(totals)}
    return rows


def shares(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Shares of the step: ``rollout``, ``model``, and ``neither``."""
    rollout, model = (math.fsum(rows[name]["share"] for name in names) for names in (ROLLOUT, MODEL))
    neither = math.fsum(rows[name]["share"] for name in PARTS if name not in ROLLOUT + MODEL)
    return {"rollout": rollout, "model": model, "neither": neither}


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "what", "mean", "share", "slowest rank")
    for name, row in rows.items():
        if name == "step":
            table.add_section()
        kind = "rollout: " if name in ROLLOUT else "model: " if name in MODEL else ""
        what = kind + PARTS.get(name, "together")
        table.add_row(name, what, f"{row['mean']:.4f} s", f"{row['share']:.2%}", f"{row['slowest_rank']:.4f} s")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    found = shares(rows)
    print(f"rollout {found['rollout']:.2%}, model {found['model']:.2%}, neither {found['neither']:.2%}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="recipe, as for dcpo train; default: the demo's"
    )
    made.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    made.add_argument("--steps", type=int, default=10, help="steps measured (default 10)")
    made.add_argument("--warm-up", type=int, default=3, help="steps before them (default 3)")
    made.add_argument(
        "--demo",
        metavar="FOLDER",
        help="start model and data of the demo: made there, or used again; default: made anew",
    )
    made.add_argument(
        "--shape", choices=SHAPES, help="a Qwen2 model of this shape with random weights, and its own recipe"
    )
    made.add_argument(
        "--server-python", metavar="PATH", help="with --shape: sample on a SGLang server, started by this interpreter"
    )
    made.add_argument("--trace", metavar="FILE", help="write a Chrome trace of the measured steps")
    made.add_argument("--json", metavar="FILE", help="also write every number to this file")
    made.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(arguments)
    if args.measure:
        return measure(args)
    wrong = next(
        (name for name, least in (("ranks", 1), ("steps", 1), ("warm_up", 0)) if getattr(args, name) < least), None
    )
    if wrong:
        print(f"bench_step: error: --{wrong.replace('_', '-')} is too small", file=sys.stderr)
        return 2
    if (args.shape and (args.config or args.demo)) or (args.server_python and not args.shape):
        print(
            "bench_step: error: --shape goes with neither --config nor --demo, --server-python with it", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        settings = [f"output={json.dumps(str(folder / 'run'))}", "logging.console=false"]
        recipes = args.config
        if args.shape:
            quiet_libraries()
            settings += _random_model(args.shape, folder / "shape")
        elif not recipes and not any(word.startswith("model.path=") for word in args.overrides):
            recipes = [str(RECIPE)]
            settings += _demo(Path(args.demo) if args.demo else folder / "demo")
        settings += [*args.overrides, f"training.steps={args.warm_up + args.steps}", "evaluation.files=[]"]
        command = [__file__, "--measure", str(folder), "--steps", str(args.steps), "--warm-up", str(args.warm_up)]
        command += [word for file in recipes for word in ("--config", file)]
        command += ["--trace", "yes"] if args.trace else []
        from dcpo_megatron.launch.local import run_ranks
        from dcpo_megatron.rollout.serving import ServingError

        try:
            with _server(args.server_python, folder) as running:
                if running is not None:
                    settings += ["rollout.engine=sglang", f"servers.urls={json.dumps(running.urls)}"]
                code = run_ranks(args.ranks, [*command, *settings])
        except ServingError as error:
            print(f"bench_step: error: {error}", file=sys.stderr)
            return 2
        if code:
            return code
        found = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(args.ranks)]
    rows = summary(found)
    print(
        f"{args.ranks} ranks, {args.steps} steps after {args.warm_up} of warm-up; "
        f"{' '.join([args.shape or '', *recipes, *args.overrides])}"
    )
    show(rows)
    if args.trace:
        from dcpo_megatron.monitor.timeline import Event, chrome_trace

        trace = chrome_trace({rank: [Event(*event) for event in one["events"]] for rank, one in enumerate(found)})
        Path(args.trace).write_text(json.dumps(trace), encoding="utf-8")
        print(f"trace: {args.trace} (open it in chrome://tracing or Perfetto)")
    if args.json:
        numbers = {"shape": args.shape, "parts": rows, "shares": shares(rows), "ranks": [one["steps"] for one in found]}
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def _random_model(name: str, folder: Path) -> list[str]:
    """A Hugging Face folder of a shape, its tokenizer and prompts, and the recipe; as settings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dcpo_megatron.files import write_jsonl
    from dcpo_megatron.toys.arithmetic import make_arithmetic
    from dcpo_megatron.toys.warm_up import make_tokenizer, save

    tokens = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[name], **tokens, tie_word_embeddings=True))
    save(model.to(torch.bfloat16), make_tokenizer(), folder)
    write_jsonl(make_arithmetic(512, seed=0, max_operand=49), folder / "prompts.jsonl")
    paths = {
        "model.path": str(folder),
        "data.files": [str(folder / "prompts.jsonl")],
        "reward.function": f"{__file__}:coin",
    }
    return [f"{key}={json.dumps(value)}" for key, value in paths.items()] + SHAPE_RECIPE


def _server(python: str | None, folder: Path):
    """A server of the shape that shares the trainer's GPU, or nothing."""
    if not python:
        return nullcontext()
    from dcpo_megatron.rollout.serving import start_servers

    return start_servers(folder / "shape", command=[python], colocated=True, logs=folder, say=print)


def _demo(folder: Path) -> list[str]:
    """The demo's start model and data in ``folder``, as settings; made where they are not there."""
    if not (folder / "start" / "config.json").is_file():
        from dcpo_megatron.cli.demo import prepare

        quiet_libraries()
        prepare(folder, seed=0)
    paths = {"model.path": str(folder / "start"), "data.files": [str(folder / "train.jsonl")]}
    return [f"{key}={json.dumps(value)}" for key, value in paths.items()]


if __name__ == "__main__":
    sys.exit(main())
