r"""A reward for tasks whose answers are whole numbers, as a function by dotted path: ``reward.function:
dcpo_megatron.toys.boxed_integer:reward``.

The mathematics reward takes every form of the number (``017``, ``17.0``, ``12+5=17``). Where the calculation is the
task, the box must hold the number itself, written as usual.
"""

from dcpo_megatron.rewards.mathematics.boxed import last_boxed


def reward(response: str, ground_truth: str) -> float:
    r"""The paper's three levels: +1 the last ``\boxed{...}`` holds exactly ``ground_truth``, 0 it holds something else,
    -1 there is none."""
    answer = last_boxed(response)
    if answer is None:
        return -1.0
    return 1.0 if answer == ground_truth.strip() else 0.0
