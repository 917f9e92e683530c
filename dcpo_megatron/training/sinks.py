"""Where metrics go: a console line, JSONL, TensorBoard, W&B. Rank 0 writes; the others hold a sink that does nothing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from rich.markup import escape

from dcpo_megatron.training.config import Config
from dcpo_megatron.training.metrics import check_declared


class Sinks:
    """Writes one step's metrics everywhere they were asked for. ``metrics.jsonl`` is always written."""

    def __init__(self, config: Config, folder: Path, is_writer: bool, total_steps: int):
        self.is_writer = is_writer
        self._total = total_steps
        self._console = self._board = self._wandb = None
        if not is_writer:
            return
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        if config.logging.console:
            from rich.console import Console

            self._console = Console(highlight=False)
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if config.logging.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.logging.wandb_project, dir=str(folder), config=config.model_dump(mode="json")
            )
        self._started: float | None = None

    def say(self, text: str) -> None:
        """A line for people, on the writer's console."""
        if self._console is not None:
            self._console.print(text, markup=True, soft_wrap=True)

    def announce(self, text: str) -> None:
        """What must be said whether or not there is a console line a step."""
        if self._console is not None:
            self.say(escape(text))
        elif self.is_writer:
            print(text, flush=True)

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
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._console is not None:
            self._console.print(self._line(step, metrics), soft_wrap=True)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Logs an evaluation after ``step`` steps."""
        if not self.is_writer:
            return
        self._file.write(json.dumps({"step": step, **{f"eval_{name}": value for name, value in result.items()}}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in result.items():
                self._board.add_scalar(f"eval/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"eval/{name}": value for name, value in result.items()}, step=step)
        self.say(
            f"[bold]evaluation after step {step}[/bold]: accuracy {result['accuracy']:.3f}, greedy {result['greedy']:.3f}, "
            f"mean length {result['response_length']:.1f}"
        )

    def _line(self, step: int, m: dict[str, float]) -> str:
        def show(name: str, form: str) -> str:
            return format(m[name], form) if name in m else "-"

        done = step / self._total if self._total else 1.0
        left = (time.perf_counter() - self._started) * (1 / done - 1) if step else 0.0
        bar = "━" * round(10 * done) + "╌" * (10 - round(10 * done))
        return (
            f"[cyan]{bar}[/cyan] step [bold]{step:>4}/{self._total}[/bold]  reward {show('reward', '+.3f')}  acc {show('accuracy', '.3f')}  "
            f"RUR {show('response_utilization_ratio', '.2f')}  TCR {show('token_clipping_ratio', '.4f')}  ent {show('entropy', '.3f')}  "
            f"len {show('response_length', '.1f')}  |g| {show('gradient_norm', '.3f')}  {show('seconds', '.1f')} s  left {left:.0f} s"
        )

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        if not self.is_writer:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
