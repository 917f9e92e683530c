"""Which prompts a step takes: every prompt once an epoch, in an order that the seed and the epoch alone decide.

A batch may reach over the end of an epoch. Its prompts are distinct nevertheless: those it already took from the ending
epoch are held back in the new one until the batch is full, and then stand where the shuffle put them. So each epoch is
still a permutation, and the state is a few numbers: seed, epoch, position, and what was held back.
"""

import random
from typing import Any


class PromptSampler:
    """Hands out positions 0..prompts_count-1. Two samplers with the same arguments and state go on identically.

    The shuffle is Python's Mersenne Twister seeded by text, which is the same on every platform and Python version.
    Raises ValueError if ``prompts_count`` is below 1.
    """

    def __init__(self, prompts_count: int, seed: int) -> None:
        if prompts_count < 1:
            raise ValueError(f"a sampler needs at least 1 prompt, not {prompts_count}")
        self._epoch: int
        self._position: int
        self._order: list[int]
        self._count = prompts_count
        self._seed = seed
        self._start_epoch(0, [], 0)

    @property
    def epoch(self) -> int:
        """The epoch that the next prompt belongs to, counted from 0."""
        return self._epoch + (self._position == self._count)

    def next(self, n: int) -> list[int]:
        """``n`` distinct positions. Raises ValueError if n is below 1 or above the number of prompts."""
        if n < 1:
            raise ValueError(f"prompts_per_step = {n}: it must be at least 1")
        if n > self._count:
            raise ValueError(f"prompts_per_step > prompts: {n} a step, but only {self._count} prompts were loaded")
        batch = self._order[self._position : self._position + n]
        self._position += len(batch)
        missing = n - len(batch)
        if missing:
            self._start_epoch(self._epoch + 1, batch, missing)
            batch = batch + self._order[:missing]
            self._position = missing
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and lists, fit for JSON."""
        return {
            "prompts_count": self._count,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "held_back": list(self._held_back),
            "held_back_for": self._held_back_for,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state was taken. Raises ValueError if it was taken with other prompts or another
        seed."""
        for name, mine in (("prompts_count", self._count), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(f"the sampler's state was saved with {name} = {state[name]}, and this run has {mine}")
        self._start_epoch(state["epoch"], list(state["held_back"]), state["held_back_for"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int, held_back: list[int], held_back_for: int) -> None:
        order = list(range(self._count))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        if held_back:
            held = set(held_back)
            first = [index for index in order if index not in held][:held_back_for]
            taken = set(first)
            order = first + [index for index in order if index not in taken]
        self._epoch, self._position, self._order = epoch, 0, order
        self._held_back, self._held_back_for = held_back, held_back_for
