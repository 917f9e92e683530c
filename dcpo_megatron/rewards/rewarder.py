"""Rewards for a batch of responses, by the built-in mathematics reward or by any Python function of the user.

A function that raises, hangs, exhausts memory or returns no finite number costs that response only: it gets
``failure_reward``, and the reason is counted in ``failures``. User functions run in worker processes (one copy of the
module's state in each); the mathematics reward decides most answers without one.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

from dcpo_megatron.rewards.mathematics.judge import MathJudge
from dcpo_megatron.rewards.worker_client import START_TIMEOUT, WorkerPool, check_lengths

logger = logging.getLogger(__name__)


class ScoredReward(NamedTuple):
    """The reward of one response; where the function failed on it, the reason and a detail for the log."""

    reward: float
    failure: str | None = None
    detail: str = ""


class Rewarder:
    r"""Scores responses against ground truths.

    ``function``: "math" for the three-level mathematics reward, or a name for ``load_reward_function``.
    ``timeout_seconds``: wall-clock limit for one response. ``failure_reward``: the reward where the function failed.
    ``workers``: processes side by side. ``memory_bytes``: bound on the address space of a user function's process.
    ``start_timeout_seconds``: limit for a worker's start, which includes the import of the user's module.

    Starts one worker at once, so that a missing function or package is refused here: raises RewardError (ValueError).
    Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        function: str = "math",
        timeout_seconds: float = 5.0,
        failure_reward: float = 0.0,
        workers: int = 1,
        memory_bytes: int | None = None,
        start_timeout_seconds: float = START_TIMEOUT,
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be above 0, not {timeout_seconds}")
        self.failures: Counter[str] = Counter()
        self._timeout = timeout_seconds
        self._failure_reward = failure_reward
        self._judge: MathJudge | None = None
        self._pool: WorkerPool | None = None
        if function == "math":
            self._judge = MathJudge(workers, start_timeout_seconds)
            self._judge.start()
        else:
            place, colon, attribute = function.rpartition(":")
            if place.endswith(".py"):  # a worker that starts later may see another working directory
                function = os.path.abspath(place) + colon + attribute
            self._pool = WorkerPool(function, workers, memory_bytes, start_timeout_seconds)
            self._pool.start()

    def score(self, texts: Sequence[str], ground_truths: Sequence[str]) -> list[float]:
        """One reward a response, in order. Raises ValueError if the lengths differ."""
        return [scored.reward for scored in self.score_each(texts, ground_truths)]

    def score_each(self, texts: Sequence[str], ground_truths: Sequence[str]) -> list[ScoredReward]:
        """As ``score``, with the reason of every failure."""
        check_lengths(texts, ground_truths)
        if self._judge is not None:
            outcomes = self._judge.judge(texts, ground_truths, self._timeout)
        else:
            outcomes = self._pool.run(list(zip(texts, ground_truths, strict=True)), self._timeout)
        scored = []
        for outcome in outcomes:
            if outcome.failure is not None:
                if not self.failures[outcome.failure]:  # every further one is in the counter
                    logger.warning("the reward function failed on a response (%s): %s", outcome.failure, outcome.detail)
                self.failures[outcome.failure] += 1
            value = self._failure_reward if outcome.value is None else outcome.value
            scored.append(ScoredReward(value, outcome.failure, outcome.detail))
        return scored

    def close(self) -> None:
        """Ends the worker processes. Also happens at exit."""
        for holder in (self._judge, self._pool):
            if holder is not None:
                holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def score(
    function: str,
    responses: Sequence[str],
    ground_truths: Sequence[str],
    timeout_seconds: float = 5.0,
    failure_reward: float = 0.0,
    workers: int = 1,
) -> list[ScoredReward]:
    """Scores one batch with processes of its own, ended afterwards; see ``Rewarder`` for the arguments and errors."""
    with Rewarder(function, timeout_seconds, failure_reward, workers) as rewarder:
        return rewarder.score_each(responses, ground_truths)
