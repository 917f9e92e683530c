#!/usr/bin/env python3
r"""Chains of arithmetic with worked steps, as hard as wanted: training and held-out prompts as JSON lines, and for a
CPU a small model warmed up on others.

    python tools/make_task.py --output runs/task --train 5000 --held-out 500 --terms 3 8 --digits 2 4 --operations '+-*'
    python tools/make_task.py --output runs/task --model                      # with a start model, minutes on a CPU

A problem draws its number of terms and the digits of each operand: the set holds easy and hard ones. ``--question``
words the prompt for a model that was not made here: --question 'What is CHAIN? Please reason step by step, and put your
final answer within \boxed{}.' Answers are whole numbers: train with
reward.function=dcpo_megatron.toys.boxed_integer:reward, so that the question itself is no answer.
"""

import argparse
import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Chains of arithmetic: prompts, and a start model.")
    result.add_argument(
        "--output", required=True, metavar="FOLDER", help="train.jsonl, held_out.jsonl and start/ go here"
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--train", type=int, default=256, help="prompts (default: %(default)s)")
    result.add_argument("--held-out", type=int, default=128, help="prompts (default: %(default)s)")
    result.add_argument("--terms", type=int, nargs=2, default=(2, 4), metavar=("LEAST", "MOST"))
    result.add_argument("--digits", type=int, nargs=2, default=(1, 2), metavar=("LEAST", "MOST"))
    result.add_argument("--operations", default="+-", help="of + - * (default: %(default)s)")
    result.add_argument(
        "--question", default="CHAIN=", help="the prompt, CHAIN for the expression (default: %(default)s)"
    )
    result.add_argument("--model", action="store_true", help="make the start model too")
    result.add_argument(
        "--target", type=float, default=0.3, help="its accuracy after the warm-up (default: %(default)s)"
    )
    result.add_argument("--hidden", type=int, default=128, help="its width (default: %(default)s)")
    result.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    return result


def main(argv: list[str] | None = None) -> int:
    """Writes the files; returns the exit code."""
    args = parser().parse_args(argv)
    from dcpo_megatron.files import write_jsonl
    from dcpo_megatron.toys.chains import ChainTask, make_chains

    folder = Path(args.output)
    try:
        task = ChainTask(tuple(args.terms), tuple(args.digits), args.operations, args.question)
        if args.model:
            if args.question != "CHAIN=":
                raise ValueError("--question is for models that were not made here: leave it out with --model")
            return _with_model(args, folder)
        parts = {"train": args.train, "held_out": args.held_out}
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in parts.items():
            write_jsonl(make_chains(count, args.seed, task, split), folder / f"{split}.jsonl")
    except ValueError as error:
        print(f"make_task: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.train} prompts in {folder / 'train.jsonl'}, {args.held_out} in {folder / 'held_out.jsonl'}")
    return 0


def _with_model(args, folder: Path) -> int:
    from dcpo_megatron.comparison.plan import TaskSection
    from dcpo_megatron.comparison.study_start import make_start

    task = TaskSection(
        terms=tuple(args.terms),
        digits=tuple(args.digits),
        operations=args.operations,
        train=args.train,
        held_out=args.held_out,
        target=args.target,
        model={"hidden": args.hidden, "layers": args.layers},
    )

    def say(step: int, loss: float, accuracy: float) -> None:
        if step % 100 == 0:
            print(f"warm-up: step {step}, loss {loss:.3f}, right {accuracy:.0%} of {args.target:.0%}", file=sys.stderr)

    try:
        made = make_start(folder, task, args.seed, say)
    except RuntimeError as error:
        print(f"make_task: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.train} and {args.held_out} prompts and a model ({made['warm_up_accuracy']:.0%} right) in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
