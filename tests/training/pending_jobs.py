"""Functions that run on the ranks of a pool: batches begun before their step, and the comparison of log-probs."""

import threading
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dcpo_megatron.data import decode_responses, encode_responses
from dcpo_megatron.distributed import all_gather_on_host


def _phase(start: str, beside: bool, whole_prompts: bool = False):
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.rewards import Rewarder
    from dcpo_megatron.rollout import EmbeddedEngine, SamplingParams
    from dcpo_megatron.training.rollout_phase import RolloutPhase
    from dcpo_megatron.training.tokenizer import load_tokenizer

    class BesideEngine(EmbeddedEngine):
        """The embedded engine in a thread: one that samples beside something else, as servers do."""

        def start(self, requests, sampling):
            self.asked = list(requests)
            batch = threading.Thread(target=lambda: setattr(batch, "found", self.generate(requests, sampling)))
            batch.start()
            batch.done_so_far = lambda: dict(list(enumerate(batch.found))[::2])  # every second one, say
            batch.cancel = batch.join
            return batch

        def finish(self, batch, progress=None):
            batch.join()
            return batch.found

    return RolloutPhase(
        engine=(BesideEngine if beside else EmbeddedEngine)(start),
        tokenizer=load_tokenizer(Path(start), 15),
        rewarder=Rewarder("tests.training.rewards:digits", 5.0, 0.0, 1),
        objective=replace(get_preset("grpo"), advantage="group"),
        history=None,
        sampling=SamplingParams(6, 1.0, stop_token_ids=(0,)),
        group_size=4,
        correct_at=0.5,
        seed=3,
        whole_prompts=whole_prompts,
    )


def _prompts():
    from dcpo_megatron.data import Prompt

    return [Prompt(f"p{n}", (1 + n, 2, 3), str(n), "made", "") for n in range(3)]


def _responses(phase, step):
    result = phase.run(_prompts, step, prompts_wanted=3, max_rounds=1)
    everyone = [decode_responses(payload) for payload in all_gather_on_host(encode_responses(result.held))]
    table, turns = result.table, [iter(part) for part in everyone]
    responses = [next(turns[holder]) for holder in table.holder]
    assert [(r.prompt_id, r.sample_index, r.advantage) for r in responses] == [
        (table.prompt_id(row), table.sample[row], table.advantage[row]) for row in range(len(table))
    ]
    return responses


def begun_and_not(start: str, whole_prompts: bool):
    """The same step's responses: sampled when asked for; begun before, by an engine that samples beside; by one that
    does not."""
    found = []
    for beside, begin in ((False, False), (True, True), (False, True)):
        phase = _phase(start, beside, whole_prompts)
        if begin:
            phase.begin(_prompts(), 7)
        found.append(_responses(phase, 7))
        phase.rewarder.close()
    return found


def saved_and_taken_up(start: str, folder: str, writers: int, read: bool):
    """A batch begun on ``writers`` ranks and written as a checkpoint does; or, with ``read``, taken up from there.
    Responses, and how many were asked for."""
    from dcpo_megatron.training.pending import read_pending

    phase = _phase(start, beside=True)
    if read:
        step, prompts, finished = read_pending(Path(folder), _prompts())
        phase.begin(prompts, step, finished)
        kept = len(phase.pending.known)
        assert kept + len(phase.engine.asked) == len(phase.pending.jobs)
    else:
        phase.begin(_prompts(), 7)
        phase.pending.handle.join()
        phase.pending.write(phase.pending.finished(), Path(folder), dist.get_rank())
        kept = 0
    responses = _responses(phase, 7)
    phase.rewarder.close()
    return responses, kept


def mismatch(gap: float, aged_gap: float, limit: float):
    """Eight tokens a rank, half of them sampled under older weights, whose log-probs differ by the gaps. The message,
    or None."""
    from dcpo_megatron.mcore.batch import TrainingSample
    from dcpo_megatron.monitor.mismatch import MismatchError, check_mismatch

    old = torch.full((8,), -1.0)
    rollout = old + torch.tensor([aged_gap] * 4 + [gap] * 4)
    hidden = old.clone()
    hidden[-1] = float("nan")  # held by another context-parallel rank
    sequences = [
        TrainingSample(0, [1], [2] * 8, old_logprobs=hidden, rollout_logprobs=rollout),
        TrainingSample(0, [1], [2] * 8),
    ]
    try:
        check_mismatch(
            3, sequences, [4], limit=limit, counts_here=dist.get_rank() == 0
        )  # fmt: skip
    except MismatchError as error:
        return str(error)
    return None
