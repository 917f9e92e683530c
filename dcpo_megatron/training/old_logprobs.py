"""Old and reference log-probs of a step, before its first update.

Several updates: a forward-only pass over all of their micro-batches gives the old ones. One update: its own forward
pass gives them, the same to the bit, unless they are looked at before it: ``rollout.max_mismatch`` is a limit, or
samples of this step are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dcpo_megatron.mcore.batch import TrainingSample

if TYPE_CHECKING:
    from dcpo_megatron.training.loop import Trainer


def take_logprobs(trainer: Trainer, step: int, minibatches: Sequence[Sequence[Sequence[TrainingSample]]]) -> None:
    """Fills ``old_logprobs`` in, where the step needs them before its first update, and ``reference_logprobs``, where
    there is a reference: in the very micro-batches that the updates will use. Collective over all ranks.

    ``minibatches``: of each the micro-batches of this data-parallel rank.
    """
    everything = [micro_batch for micro_batches in minibatches for micro_batch in micro_batches]
    if not everything:
        return
    run, policy, reference = trainer.run_, trainer.policy, trainer.reference
    looked_at = run.config.rollout.max_mismatch is not None or trainer.monitors.samples.due(step)
    needed = len(minibatches) > 1 or looked_at
    old = policy.logprobs(everything, objective=run.objective) if needed else {}
    known = {} if reference is None else reference.logprobs(everything)
    for sequence in (sequence for micro_batch in everything for sequence in micro_batch):
        sequence.old_logprobs = old.get(sequence.number)
        sequence.reference_logprobs = known.get(sequence.number)
