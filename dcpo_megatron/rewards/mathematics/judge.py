r"""The paper's reward for mathematics: +1 right, 0 well-formed but wrong, -1 where no balanced ``\boxed{...}`` is
found.

    response --final_answer--> answer --settle--> True / False
                                       | neither: only algebra can tell
                                       v
                             math-verify in a worker process, under a time and a memory limit

An answer that math-verify cannot judge within the limits is wrong (0): an answer that nobody can check is no answer.
"""

from collections.abc import Sequence
from functools import lru_cache

from dcpo_megatron.rewards.mathematics.boxed import final_answer, last_boxed
from dcpo_megatron.rewards.mathematics.verdict import Settled, settle
from dcpo_megatron.rewards.worker_client import START_TIMEOUT, Outcome, WorkerPool, check_lengths

RIGHT, WRONG, MALFORMED = 1.0, 0.0, -1.0
_MEMORY_BYTES = 4 << 30
_CACHED_ANSWERS = 100_000


def is_correct(reward: float) -> bool:
    """Whether a reward means a right answer: exactly +1 on the three levels."""
    return reward == RIGHT


class MathJudge:
    """Gives responses the three-level reward; thread-safe, and keeps verdicts on (answer, ground truth) it has seen.

    ``workers``: processes side by side. ``start_timeout``: seconds for the start of one.
    """

    def __init__(self, workers: int = 1, start_timeout: float = START_TIMEOUT) -> None:
        self._pool = WorkerPool(
            "dcpo_megatron.rewards.mathematics.algebra:judge", workers, _MEMORY_BYTES, start_timeout
        )
        # A cache of empty slots: lru_cache needs no lock of ours, which a fork could leave locked for ever.
        self._slot = lru_cache(_CACHED_ANSWERS)(lambda answer, gold, timeout: [])

    def judge(
        self, responses: Sequence[str], ground_truths: Sequence[str], timeout_seconds: float = 5.0
    ) -> list[Outcome]:
        """One outcome a response: a value of 1, 0 or -1, or a failure ("timeout", "exception", "memory", "died").

        ``timeout_seconds`` is the wall-clock limit for one answer; equal answers to one ground truth are judged
        once. Raises ValueError if the lengths differ, RewardError if the worker process cannot be started.
        """
        check_lengths(responses, ground_truths)
        outcomes: list[Outcome | None] = []
        undecided: dict[tuple[str, str], list[int]] = {}
        # The responses to one prompt share their gold, and most of them a few answers.
        golds = {ground_truth: _bare(ground_truth) for ground_truth in set(ground_truths)}
        verdicts: dict[tuple[str, str], Settled] = {}
        for index, (response, ground_truth) in enumerate(zip(responses, ground_truths, strict=True)):
            answer = final_answer(response)
            gold = golds[ground_truth]
            if answer is None:
                outcomes.append(Outcome(MALFORMED))
                continue
            if (answer, gold) not in verdicts:
                verdicts[answer, gold] = settle(answer, gold)
            verdict = verdicts[answer, gold]
            outcomes.append(None if verdict.equal is None else Outcome(RIGHT if verdict.equal else WRONG))
            if verdict.equal is None:
                undecided.setdefault((verdict.answer, verdict.gold), []).append(index)
        # Held here, whatever the cache drops meanwhile.
        slots = {pair: self._slot(*pair, timeout_seconds) for pair in undecided}
        new = [pair for pair, slot in slots.items() if not slot]
        for pair, outcome in zip(new, self._pool.run(new, timeout_seconds), strict=True):
            slots[pair].append(outcome)
        for pair, indices in undecided.items():
            for index in indices:
                outcomes[index] = slots[pair][0]
        return outcomes

    def start(self) -> None:
        """Starts the first worker process now. Raises RewardError, for example where math-verify is not installed."""
        self._pool.start()

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()


def math_reward(response: str, ground_truth: str, timeout_seconds: float = 5.0) -> float:
    r"""+1.0, 0.0 or -1.0 for one response. ``ground_truth`` is a bare answer, or text that holds one in
    ``\boxed{...}``.

    Nothing in the two strings makes it raise or wait longer than ``timeout_seconds``, plus the start of a worker.
    Raises RewardError if the worker process cannot be started at all.
    """
    return math_reward_batch([response], [ground_truth], timeout_seconds=timeout_seconds)[0]


def math_reward_batch(
    responses: Sequence[str], ground_truths: Sequence[str], workers: int = 1, timeout_seconds: float = 5.0
) -> list[float]:
    """``math_reward`` of each pair, with ``workers`` processes side by side. Raises ValueError if the lengths
    differ."""
    outcomes = _shared_judge(workers).judge(responses, ground_truths, timeout_seconds)
    return [WRONG if outcome.value is None else outcome.value for outcome in outcomes]


@lru_cache(maxsize=4)
def _shared_judge(workers: int) -> MathJudge:
    return MathJudge(workers)


def _bare(ground_truth: str) -> str:
    boxed = last_boxed(ground_truth) if "boxed" in ground_truth else None
    return ground_truth.strip() if boxed is None else boxed
