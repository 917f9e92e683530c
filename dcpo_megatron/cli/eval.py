"""``dcpo eval MODEL FILE ...``: Avg@1, Avg@k and pass@k of a model on files of problems, every response kept.

Exit codes: 0 done; 2 what was given cannot be used (one clear sentence on standard error); 75 out of time, the same
command goes on; 130 interrupted, likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from dcpo_megatron.console.progress import LINE_SECONDS
from dcpo_megatron.console.quiet import quiet_libraries, write_any_letter
from dcpo_megatron.launch.signals import BAD_INPUT, INTERRUPTED, START_AGAIN


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dcpo eval",
        allow_abbrev=False,
        description=(
            "Accuracy of a model on verl-style parquet, jsonl and GSM8K files: greedy, mean of samples, pass@k, with"
            " intervals."
        ),
        epilog="Started again with the same command, it goes on where it was.",
    )
    add = result.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder; with --servers its tokenizer is used")
    add("files", nargs="+", metavar="FILE", help="each a set; copies of a problem count once")
    add("--output", required=True, metavar="FOLDER", help="responses.jsonl, result.json, settings.json")
    add("--samples", type=_at_least(0), default=32, metavar="K", help="samples a problem (32); 0: greedy alone")
    add("--no-greedy", action="store_true", help="no greedy response")
    add("--max-response-tokens", type=_at_least(1), default=3072, metavar="N", help="3072")
    add("--temperature", type=float, default=1.0, help="of the samples (1)")
    add("--top-p", type=float, default=1.0, help="of the samples (1)")
    add(
        "--stop-token-ids",
        nargs="+",
        type=_at_least(0),
        default=[],
        metavar="ID",
        help="tokens that end a response, beside the model's own end-of-text tokens",
    )
    add("--seed", type=int, default=0)
    add("--limit", type=_at_least(1), default=None, metavar="N", help="problems of each file")
    add("--template", choices=("auto", "chat", "qwen-math", "plain"), default="auto")
    add("--system-prompt", default=None, metavar="TEXT", help="replaces the rows' own; empty removes it")
    add("--max-prompt-tokens", type=_at_least(1), default=None, metavar="N", help="longer prompts are left out")
    for name, what in (("prompt", "the prompt"), ("answer", "the ground truth"), ("id", "the id")):
        add(f"--{name}-key", default=None, metavar="PATH", help=f"dotted path of {what}")
    add("--reward", default="math", metavar="NAME", help="math, or package.module:function, or file.py:function")
    add("--correct-at", type=float, default=1.0, help="least reward of a right response (1)")
    add("--reward-timeout", type=float, default=5.0, metavar="SECONDS", help="for one response (5)")
    add("--reward-workers", type=_at_least(1), default=1, metavar="N")
    add(
        "--servers",
        nargs="+",
        default=[],
        metavar="URL",
        help="SGLang servers that serve the model; default: in this process",
    )
    add(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="of a server's silence until it is asked whether it still samples",
    )
    add(
        "--batch-size",
        type=_at_least(1),
        default=None,
        metavar="N",
        help="responses sampled together, and lost together by a kill (64; 512 with servers)",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--dtype", choices=("float32", "bfloat16"), default=None, help="default: float32 on a CPU, bfloat16 on a GPU")
    add(
        "--deadline",
        type=float,
        default=None,
        metavar="MINUTES",
        help="stop after the batch under way then, with exit code 75",
    )
    add("--json", action="store_true", help="print result.json instead of the table")
    add("--quiet", action="store_true", help="no progress")
    return result


def main(argv: list[str] | None = None) -> int:
    """Evaluates; returns the exit code."""
    args = parser().parse_args(argv)
    quiet_libraries()
    write_any_letter()
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.data import DataError
    from dcpo_megatron.evaluation.offline import OutOfTime
    from dcpo_megatron.evaluation.store import EvaluationError
    from dcpo_megatron.mcore.hf_config import ModelConfigError
    from dcpo_megatron.rewards import RewardError
    from dcpo_megatron.rollout import RolloutError

    try:
        return _evaluate(args)
    except OutOfTime:
        print(
            f"dcpo eval: {args.deadline:g} minutes are over; what is finished is kept in {args.output}, the same"
            " command goes on",
            file=sys.stderr,
        )
        return START_AGAIN
    except KeyboardInterrupt:
        print(
            f"\ndcpo eval: interrupted; what is finished is kept in {args.output}, the same command goes on",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (
        EvaluationError,
        DataError,
        ConfigError,
        ModelConfigError,
        RewardError,
        RolloutError,
        OSError,
        ValueError,
    ) as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return BAD_INPUT


def _evaluate(args: argparse.Namespace) -> int:
    from dcpo_megatron.data import PromptOptions
    from dcpo_megatron.evaluation import offline as eval_run
    from dcpo_megatron.evaluation.engine import check_model_folder, make_evaluation_engine
    from dcpo_megatron.evaluation.store import EvaluationError, ResponseStore
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.rewards import Rewarder
    from dcpo_megatron.training.introduction import introduce
    from dcpo_megatron.training.tokenizer import load_tokenizer, stop_token_ids

    started = time.monotonic()
    if args.no_greedy and not args.samples:
        raise EvaluationError("--no-greedy with --samples 0 leaves nothing to do")
    check_model_folder(args.model)
    shape = read_shape(args.model)
    tokenizer = load_tokenizer(args.model, shape.vocab)
    options = PromptOptions(
        prompt_key=args.prompt_key, answer_key=args.answer_key, id_key=args.id_key, template=args.template,
        system_prompt=args.system_prompt, max_prompt_tokens=args.max_prompt_tokens, on_bad_row="skip",
        on_duplicate_id="first", limit=args.limit,
    )  # fmt: skip
    sets = eval_run.load_sets(args.files, tokenizer, options)
    sampling = eval_run.EvaluationSampling(
        args.samples, not args.no_greedy, args.max_response_tokens, args.temperature, args.top_p,
        stop_token_ids(args.model, tokenizer, args.stop_token_ids), args.seed, args.correct_at,
    )  # fmt: skip
    if max(args.stop_token_ids, default=0) >= shape.vocab:
        raise EvaluationError(
            f"--stop-token-ids {max(args.stop_token_ids)}: the model's vocabulary has {shape.vocab} tokens"
        )
    longest = max(len(prompt.token_ids) for s in sets for prompt in s.prompts) + args.max_response_tokens
    if longest > shape.max_positions:
        raise EvaluationError(
            f"the longest prompt and --max-response-tokens {args.max_response_tokens} make {longest} tokens, the model"
            f" computes {shape.max_positions}: lower --max-response-tokens, or leave long prompts out with"
            " --max-prompt-tokens"
        )
    platform = select_platform(args.device)
    dtype = args.dtype or ("float32" if platform.is_cpu else "bfloat16")
    batch = args.batch_size or (512 if args.servers else 64)
    engine, served = make_evaluation_engine(
        args.model, args.servers, device=platform.device, dtype=dtype, max_batch=batch,
        api_key=os.environ.get("DCPO_SGLANG_API_KEY") or None, request_timeout=args.request_timeout,
        prompts=[prompt.token_ids for prompt in sets[0].prompts],
        say=lambda line: print(f"dcpo eval: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    settings = _settings(args, served, dtype, [s.name for s in sets])
    key = " ".join(["--stop-token-ids", *map(str, args.stop_token_ids), "{}"])
    try:
        store = ResponseStore(Path(args.output), settings)
        try:
            with (
                Rewarder(args.reward, args.reward_timeout, workers=args.reward_workers) as rewarder,
                _Progress(args.quiet) as bar,
            ):
                for s in sets:
                    bar.say(
                        f"{s.name}: {len(s.prompts):,} problems of {s.rows:,} rows ({s.copies:,} copies, {s.left_out:,}"
                        f" left out){s.notes}"
                    )
                for line in introduce(sets[0].prompts[0], tokenizer, sampling.stop_token_ids, args.template, key):
                    bar.say(line)
                deadline = None if args.deadline is None else started + 60 * args.deadline
                eval_run.answer(
                    engine, tokenizer, rewarder, sets, sampling, store,
                    batch=batch, deadline=deadline, progress=bar.report,
                )  # fmt: skip
            found = eval_run.result(sets, sampling, store)
        finally:
            store.close()
    finally:
        engine.close()
    found = {"model": args.model, "samples": args.samples, "seconds": time.monotonic() - started, **found}
    _leave(found, Path(args.output), as_json=args.json)
    return 0


def _leave(found: dict, folder: Path, as_json: bool) -> None:
    """Writes ``result.json`` and prints it, or the table."""
    text = json.dumps(found, indent=2) + "\n"
    part = folder / "result.json.part"
    part.write_text(text, encoding="utf-8")
    part.rename(part.with_suffix(""))
    if as_json:
        print(text, end="")
    else:
        _show(found, folder)


def _settings(args: argparse.Namespace, served: str | None, dtype: str, names: list[str]) -> dict:
    """What the folder of responses is held against when an evaluation goes on. More samples or problems may be asked
    for later: their numbers are not among it."""
    from dcpo_megatron.evaluation.offline import file_fingerprint, model_fingerprint

    settings = {
        "model": model_fingerprint(args.model),
        "served": served,
        "dtype": None if served else dtype,
        "files": {name: file_fingerprint(file) for name, file in zip(names, args.files, strict=True)},
        "template": [args.template, args.system_prompt, args.prompt_key, args.answer_key, args.id_key],
        "max_response_tokens": args.max_response_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "reward": [args.reward, args.correct_at, args.reward_timeout],
    }
    if args.stop_token_ids:
        settings["stop_token_ids"] = sorted(set(args.stop_token_ids))
    return settings


def _show(found: dict, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(found["average"])
    names = [name for name in names if not name.startswith("pass@")] + [n for n in names if n.startswith("pass@")][-1:]
    table = Table(title=f"{found['model']}, 95 % bootstrap intervals over problems", title_justify="left")
    table.add_column("set")
    table.add_column("problems", justify="right")
    for name in names:
        table.add_column(name.capitalize(), justify="right")
    for column in ("tokens", "truncated"):
        table.add_column(column, justify="right")
    for name, of_set in found["sets"].items():
        tokens = of_set["sampled_tokens"] or of_set["greedy_tokens"]
        values = [_percent(of_set["measures"][measure]) for measure in names]
        table.add_row(name, f"{of_set['problems']:,}", *values, f"{tokens['mean']:.0f}", f"{tokens['truncated']:.1%}")
    if len(found["sets"]) > 1:
        table.add_section()
        table.add_row("average", "", *[_percent(found["average"][name]) for name in names], "", "")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    failures = sum(of_set["reward_failures"] for of_set in found["sets"].values())
    if failures:
        print(f"the reward function failed on {failures} responses; they count as wrong")
    print(
        f"{folder / 'result.json'} and every response in {folder / 'responses.jsonl'}, after {found['seconds']:.0f} s"
    )


def _percent(value: dict) -> str:
    if value["low"] is None:
        return f"{100 * value['value']:.1f}"
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


class _Progress:
    """Responses done, on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool):
        self._quiet, self._bar, self._first = quiet, None, None
        self._said = self._started = time.monotonic()

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("responses"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("")
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
            if done:
                self.say(f"{done:,} of {total:,} responses were finished before")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            rate = (done - self._first) / (now - self._started)
            self.say(f"{done:,} of {total:,} responses" + (f", {(total - done) / rate:.0f} s left" if rate else ""))


def _at_least(least: int):
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    read.__name__ = "whole number"
    return read
