"""``dcpo demo``: from nothing to a better model on a CPU, in minutes.

A small Qwen2-shaped model is warmed up by supervised steps on additions until it is right about a third of the time;
then DCPO trains it, on two ranks of real Megatron-Core, with prompts that come back several times so that SAS has a
history. With ``--servers N`` real SGLang servers sample, and take new weights after each step. With ``--pretrained
MODEL`` a real model takes the place of the small one: :mod:`dcpo_megatron.cli.demo_pretrained`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from dcpo_megatron.console.quiet import quiet_libraries
from dcpo_megatron.files import discard

TARGET = 0.31
# Only a folder that holds it may be replaced.
MARKER = ".dcpo-demo"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcpo demo", description="A small DCPO run from nothing to a better model, on a CPU."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/demo", help="folder of the run (default: %(default)s); replaced")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--servers",
        type=int,
        default=0,
        metavar="N",
        help="sample on N SGLang servers, started here (default: in the trainer)",
    )
    parser.add_argument(
        "--server-python",
        metavar="PATH",
        help="interpreter of the servers' environment (default: the checkout's .venv-sglang)",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="NAME", help="another recipe on top, such as a preset"
    )
    parser.add_argument(
        "--pretrained",
        metavar="MODEL",
        help=(
            "train this model, a Hugging Face folder or a GGUF file, on word problems (default: a small one made here)"
        ),
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="with --pretrained: the problems are GSM8K's, gsm8k_train.jsonl and gsm8k_test.jsonl of this folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)
    from dcpo_megatron.cli import demo_pretrained
    from dcpo_megatron.config.loading import load_config
    from dcpo_megatron.config.recipes import FOLDER
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.data import DataError

    # Not by name: a file called demo, here, would win.
    recipe = FOLDER / ("demo-pretrained.yaml" if args.pretrained else "demo.yaml")
    folder = Path(args.output)
    try:
        if args.pretrained:
            demo_pretrained.check_model(args.pretrained)
        if args.data and not args.pretrained:
            raise demo_pretrained.DemoError("--data is for --pretrained MODEL: the small model reads sums only")
        if args.data:
            demo_pretrained.check_data(args.data)
    except demo_pretrained.DemoError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    own = _own_settings(folder, args)
    taken = [override for override in args.overrides if override.partition("=")[0] in own]
    if taken or args.ranks < 1 or args.servers < 0:
        reason = (
            f"{taken[0]!r} is the demo's own to set: use dcpo train"
            if taken
            else f"--ranks {args.ranks} must be at least 1, --servers {args.servers} at least 0"
        )
        print(f"dcpo: error: {reason}", file=sys.stderr)
        return 2
    # JSON is YAML with every string quoted, so that any path is a path.
    settings = [f"{key}={json.dumps(value)}" for key, value in own.items()] + args.overrides
    try:
        config = load_config([recipe, *args.config], settings)
        if args.pretrained and config.training.steps < 2 * demo_pretrained.WINDOW:
            raise ConfigError(
                f"training.steps={config.training.steps}: the first {demo_pretrained.WINDOW} steps are compared with"
                f" the last {demo_pretrained.WINDOW}, so {2 * demo_pretrained.WINDOW} are needed"
            )
    except ConfigError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    if not _make_room(folder):
        return 2
    quiet_libraries()
    try:
        if args.pretrained:
            demo_pretrained.prepare(folder, args.pretrained, args.seed, args.data)
        else:
            prepare(folder, args.seed)
    except (demo_pretrained.DemoError, DataError) as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 1

    from dcpo_megatron.launch.local import run_ranks
    from dcpo_megatron.rollout.serving import ServingError

    command = ["-m", "dcpo_megatron.cli", "train", "--config", str(recipe)]
    for file in args.config:
        command += ["--config", file]
    try:
        with _servers(args, folder) as running:
            if running is not None:
                settings += ["rollout.engine=sglang", f"servers.urls={json.dumps(running.urls)}"]
            code = run_ranks(args.ranks, command + settings)
        if code == 0:
            _tell(folder)
            if args.pretrained:
                code = 0 if demo_pretrained.tell(folder, config) else 1
    except (ServingError, demo_pretrained.DemoError) as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 1
    return code


def _own_settings(folder: Path, args: argparse.Namespace) -> dict:
    own = {
        "model.path": str(folder / "start"),
        "data.files": [str(folder / "train.jsonl")],
        "evaluation.files": [str(folder / "held_out.jsonl")],
        "output": str(folder),
        "training.seed": args.seed,
    }
    return own | ({"model.weights": str(folder / "megatron")} if args.pretrained else {})


def _make_room(folder: Path) -> bool:
    """Removes an earlier demo's folder. False, said, where another thing is in its place."""
    if folder.exists() and not folder.is_dir():
        print(f"dcpo: error: --output {folder} is a file: name a folder", file=sys.stderr)
        return False
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            print(f"dcpo: error: {folder} is not empty and is no demo's folder: give another --output", file=sys.stderr)
            return False
        problem = discard(folder)
        if problem is not None:
            print(f"dcpo: {'error' if folder.exists() else 'warning'}: {problem}", file=sys.stderr)
        return not folder.exists()
    return True


def _servers(args, folder: Path):
    """The servers of the demo, or nothing."""
    if not args.servers:
        return nullcontext()
    from dcpo_megatron.rollout.serving import start_servers

    def say(line: str) -> None:
        print(line, flush=True)

    return start_servers(
        folder / "start",
        args.servers,
        command=[args.server_python] if args.server_python else None,
        device="cpu",
        logs=folder / "servers",
        say=say,
    )


def prepare(
    folder: Path, seed: int, *, train: int = 1200, held_out: int = 128, supervised: int = 1000, max_operand: int = 49
) -> None:
    """Writes ``start`` (a Hugging Face folder with the warmed-up model), ``train.jsonl`` and ``held_out.jsonl``."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from dcpo_megatron.files import write_jsonl
    from dcpo_megatron.toys.arithmetic import make_arithmetic
    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save, warm_up

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    rows = make_arithmetic(supervised + train, seed, max_operand)
    write_jsonl(rows[supervised:], folder / "train.jsonl")
    write_jsonl(make_arithmetic(held_out, seed, max_operand, split="held_out"), folder / "held_out.jsonl")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed=seed)
    columns = (TextColumn("warm-up"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns) as bar:
        task = bar.add_task("", total=TARGET)

        def show(step: int, loss: float, accuracy: float) -> None:
            bar.update(
                task,
                completed=min(accuracy, TARGET),
                description=f"step {step}, loss {loss:.3f}, right {accuracy:.0%} of {TARGET:.0%}",
            )

        steps, accuracy = warm_up(
            model,
            tokenizer,
            *(
                [(row["prompt"], f"\\boxed{{{row['answer']}}}") for row in part]
                for part in (rows[:supervised], rows[supervised:])
            ),
            target_accuracy=TARGET,
            seed=seed,
            progress=show,
        )
    save(model, tokenizer, folder / "start")
    print(
        f"warmed up in {steps} supervised steps ({time.perf_counter() - started:.0f} s): right {accuracy:.0%} of the"
        " time at temperature 1",
        flush=True,
    )


def _tell(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    print(
        f"\naccuracy on held-out problems: {summary['accuracy_before']:.3f} before, {summary['accuracy_after']:.3f}"
        f" after (greedy {summary['greedy_before']:.3f} -> {summary['greedy_after']:.3f}); {summary['steps']} steps in"
        f" {summary['train_seconds']:.0f} s\n"
        f"mean |log-prob difference| between rollout and trainer: {summary['mismatch_abs']:.1e}\n"
        f"summary: {folder / 'summary.json'}\n"
        f"picture: {folder / 'report.png'}\n"
        f"model:   {folder / 'model'}"
    )
