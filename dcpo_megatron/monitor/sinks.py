"""Where metrics go: a console line, JSONL, TensorBoard, W&B. Rank 0 writes; the others hold a sink that does
nothing."""

from __future__ import annotations

import json
import math
import secrets
import time
from pathlib import Path

from dcpo_megatron.config.schema import Config
from dcpo_megatron.files import read_rows
from dcpo_megatron.monitor.growing_file import BoardFile, GrowingFile
from dcpo_megatron.monitor.metrics import check_declared
from dcpo_megatron.monitor.prometheus import MetricsEndpoint


class Sinks:
    """Writes one step's metrics everywhere they were asked for. ``metrics.jsonl`` is always written.

    ``resumed_at``: rows of later steps, which a killed run wrote after its last checkpoint, are dropped; ``kept`` has
    those that stay. None: a new run. Where the disk is full, rows wait in memory and are written when there is room.
    """

    def __init__(self, config: Config, folder: Path, is_writer: bool, total_steps: int, resumed_at: int | None = None):
        self.is_writer = is_writer
        self._from = resumed_at or 0
        rows = [] if resumed_at is None else read_rows(folder / "metrics.jsonl")
        self.kept = [row for row in rows if row["step"] <= resumed_at]
        self._total = total_steps
        self._console = self._board = self._wandb = self._endpoint = None
        if not is_writer:
            return
        work = folder / "metrics.jsonl.part"
        work.write_text("".join(json.dumps(row) + "\n" for row in self.kept), encoding="utf-8")
        work.rename(folder / "metrics.jsonl")
        self._file = GrowingFile(folder / "metrics.jsonl", self.announce)
        if config.logging.console:
            from rich.console import Console

            self._console = Console(highlight=False)
        if config.logging.tensorboard:
            self._board = BoardFile(folder / "tensorboard", self.announce, self._from + 1 if self._from else None)
        if config.logging.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                dir=str(folder),
                config=config.model_dump(mode="json"),
                id=_run_id(folder, new=resumed_at is None),
                resume="allow",
            )
        self._started: float | None = None
        port = config.logging.prometheus_port
        if port is not None:
            try:
                self._endpoint = MetricsEndpoint(port)
            except OSError as error:
                # Metrics have other ways out: no reason to lose the run.
                self.announce(
                    f"logging.prometheus_port={port} cannot be had ({error.strerror}): training goes on without the"
                    " endpoint"
                )
            else:
                self._endpoint.update({"step": self._from, "steps_wanted": total_steps})

    def say(self, text: str) -> None:
        """A line for people, on the writer's console."""
        if self._console is not None:
            self._console.print(text, markup=True, soft_wrap=True)

    def announce(self, text: str) -> None:
        """What must be said whether or not there is a console line a step."""
        if self._console is not None:
            self._console.print(text, markup=False, emoji=False, soft_wrap=True)
        elif self.is_writer:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Something went wrong that costs the run nothing."""
        self.announce(f"warning: {text}")

    def progress(self, finished: int, total: int) -> None:
        """A passing line about the rollout under way; shown on a terminal only."""
        if self._console is not None and self._console.is_terminal:
            self._console.print(f"[dim]  sampling {finished}/{total} responses on rank 0[/dim]", end="\r")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Logs one step (numbered from 1). Raises KeyError for an undeclared metric."""
        check_declared(metrics)
        if not self.is_writer:
            return
        if self._started is None:
            self._started = time.perf_counter() - metrics["seconds"]
        # JSON has no NaN: a value that is not finite is written as null.
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._row({"step": step, **clean})
        if self._endpoint is not None:
            self._endpoint.update({"step": step, "updated_unix_seconds": time.time(), **metrics})
        if self._board is not None:
            self._board.scalars(step, metrics)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._console is not None:
            self._console.print(self._line(step, metrics), soft_wrap=True)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Logs an evaluation after ``step`` steps."""
        if not self.is_writer:
            return
        self._row({"step": step, **{f"eval_{name}": value for name, value in result.items()}})
        if self._endpoint is not None:
            self._endpoint.update({"step": step, **result}, "eval_")
        if self._board is not None:
            self._board.scalars(step, {f"eval/{name}": value for name, value in result.items()})
        if self._wandb is not None:
            self._wandb.log({f"eval/{name}": value for name, value in result.items()}, step=step)
        self.say(
            f"[bold]evaluation after step {step}[/bold]: accuracy {result['accuracy']:.3f}, greedy"
            f" {result['greedy']:.3f}, mean length {result['response_length']:.1f}"
        )

    def _row(self, row: dict) -> None:
        self._file.append((json.dumps(row) + "\n").encode())

    def _line(self, step: int, m: dict[str, float]) -> str:
        def show(name: str, form: str) -> str:
            return format(m[name], form) if name in m else "-"

        done = step / self._total if self._total else 1.0
        left = (time.perf_counter() - self._started) / (step - self._from) * (self._total - step)
        bar = "━" * round(10 * done) + "╌" * (10 - round(10 * done))
        return (
            f"[cyan]{bar}[/cyan] step [bold]{step:>4}/{self._total}[/bold]  reward {show('reward', '+.3f')}  acc"
            f" {show('accuracy', '.3f')}  RUR {show('response_utilization_ratio', '.2f')}  TCR"
            f" {show('token_clipping_ratio', '.4f')}  ent {show('entropy', '.3f')}  len"
            f" {show('response_length', '.1f')}  |g| {show('gradient_norm', '.3f')}  {show('seconds', '.1f')} s  left"
            f" {left:.0f} s"
        )

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        if not self.is_writer or self._file.closed:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._endpoint is not None:
            self._endpoint.close()


def _run_id(folder: Path, new: bool) -> str:
    """The identity under which W&B knows the run, kept in its folder."""
    file = folder / "wandb-id"
    if new or not file.is_file():
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()
