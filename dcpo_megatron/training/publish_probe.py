"""A few fixed token sequences under the training model: what a rollout server that holds the same weights must answer,
to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dcpo_megatron.data import Prompt
from dcpo_megatron.distributed import all_reduce_on_host
from dcpo_megatron.mcore.batch import TrainingSample
from dcpo_megatron.mcore.step import PolicyModel

PROBES, PROBE_TOKENS = 4, 64


@dataclass
class TrainingProbe:
    """Log-probs of the tokens of ``PROBES`` prompts, each after the ones before it.

    Args:
        policy: the trained model on this rank.
        prompts: the run's; the first ones are taken, at most ``PROBE_TOKENS`` tokens of each.
    """

    policy: PolicyModel
    prompts: Sequence[Prompt]

    def sequences(self) -> list[list[int]]:
        """Token ids, at least two a sequence: the first is given, the others are predicted."""
        # A prompt of one token is said twice.
        return [
            list((prompt.token_ids * 2)[: max(2, min(len(prompt.token_ids), PROBE_TOKENS))])
            for prompt in self.prompts[:PROBES]
        ]

    def logprobs(self) -> list[list[float]]:
        """Per sequence, log p of every token but the first, at temperature 1. Collective over all ranks; the same on
        each."""
        ids = self.sequences()
        policy, position = self.policy, self.policy.position
        # The interleaved schedule wants a multiple of the pipeline size.
        count = -(-len(ids) // position.pipeline_size) * position.pipeline_size
        micro_batches = [
            [TrainingSample(number, ids[number % len(ids)][:1], ids[number % len(ids)][1:])] for number in range(count)
        ]
        temperature, policy.temperature = policy.temperature, 1.0
        try:
            found = policy.logprobs(micro_batches)
        finally:
            policy.temperature = temperature
        lengths = [len(row) - 1 for row in ids]
        values = torch.zeros(sum(lengths), dtype=torch.float64)
        if position.owns_loss and position.data_rank == 0:
            # With context parallelism each rank has its places, and NaN at the others.
            values = torch.cat([found[number].double() for number in range(len(ids))]).nan_to_num(0.0)
        return [part.tolist() for part in all_reduce_on_host(values).split(lengths)]
