"""From prompts to responses with rewards and advantages: the first half of a step.

The prompts_per_step x G samples are dealt over ALL ranks in one contiguous slice each, so a prompt's group may be split
over ranks; rewards are judged where the response was sampled; advantages come from one all-reduce of statistics; then
every rank gets the table of the responses that will be trained on, and their tokens stay where they are.

With :meth:`RolloutPhase.begin` the first round of a later step is sampled while this one trains, by an engine that can
do so; another engine samples it when :meth:`RolloutPhase.run` of that step takes it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dcpo_megatron.advantages import RewardHistory, group_advantages, keep_mixed_groups
from dcpo_megatron.data import Prompt, Response
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.distributed import CPU, all_gather_bytes, host_group
from dcpo_megatron.launch.signals import Stopped
from dcpo_megatron.mcore.step import UpdateResult
from dcpo_megatron.monitor.timeline import Timeline
from dcpo_megatron.objectives import Objective, soft_overlong_penalty
from dcpo_megatron.rewards import Rewarder
from dcpo_megatron.rollout import GenerateRequest, Generation, RolloutEngine, SamplingParams
from dcpo_megatron.rollout.streams import share, stream_seed
from dcpo_megatron.training.exchange import exchange_table
from dcpo_megatron.training.pending import PendingBatch, response_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RolloutResult:
    """``table``: of the responses that will be trained on, advantages filled in; ``totals``: sums over all generated
    responses; both are the same on every rank. ``held``: this rank's responses, in the order of its rows."""

    table: ResponseTable
    held: list[Response]
    totals: dict[str, float]
    rounds: int


@dataclass
class RolloutPhase:
    """Samples and judges. ``group`` is the group of all ranks that sample, for messages on the host (None: all ranks);
    ``timeline`` gets the spans rollout, reward, rollout_wait and advantage."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    rewarder: Rewarder
    objective: Objective
    history: RewardHistory | None
    sampling: SamplingParams
    group_size: int
    correct_at: float
    seed: int
    group: dist.ProcessGroup | None = None
    timeline: Timeline = field(default_factory=Timeline)
    whole_prompts: bool = (
        False  # deal prompts instead of samples: a prompt's samples then share what a server keeps of it
    )
    pending: PendingBatch | None = None

    def run(
        self,
        next_prompts: Callable[[], Sequence[Prompt]],
        step: int,
        *,
        prompts_wanted: int,
        max_rounds: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> RolloutResult:
        """One rollout batch. Collective over ``group``; ``next_prompts`` must give the same prompts on every rank.

        With dynamic sampling it goes on, up to ``max_rounds`` times, until ``prompts_wanted`` prompts are kept; the
        surplus of the last round is left out.
        """
        kept: list[Response] = []
        order: dict[str, Prompt] = {}
        totals: dict[str, float] = {}
        rounds = 0
        while rounds < max_rounds:
            if rounds == 0 and self.pending is not None:
                prompts, mine = self._take_pending(step, progress)
            else:
                prompts = next_prompts()
                mine = self._sample(prompts, step, rounds, progress)
            rounds += 1
            for name, value in self._totals(mine).items():
                totals[name] = totals.get(name, 0.0) + value
            if not self.objective.dynamic_sampling:
                kept, order = mine, {prompt.id: prompt for prompt in prompts}
                break
            with self.timeline.span("advantage"):
                ids = [response.prompt_id for response in mine]
                mask = keep_mixed_groups(
                    ids, torch.tensor([bool(r.correct) for r in mine], dtype=torch.bool), self._exchange_group()
                )
                kept_here = [response for response, keep in zip(mine, mask.tolist(), strict=True) if keep]
                kept_ids = self._union(response.prompt_id for response in kept_here)
                # A prompt that comes round again within the step stays the one visit that it was.
                new = [prompt for prompt in prompts if prompt.id in kept_ids and prompt.id not in order]
                added = {prompt.id: prompt for prompt in new[: prompts_wanted - len(order)]}
                order |= added
                kept += [response for response in kept_here if response.prompt_id in added]
            if len(order) >= prompts_wanted:
                break

        with self.timeline.span("advantage"):
            self._fill_advantages(kept)
            place = {prompt_id: number for number, prompt_id in enumerate(order)}
            kept.sort(key=lambda response: (place[response.prompt_id], response.sample_index))
            assert self.engine.version is not None  # it has sampled
            table = exchange_table(kept, list(order.values()), self.engine.version, self._exchange_group())
        return RolloutResult(table, kept, totals, rounds)

    def _world(self) -> tuple[int, int]:
        return dist.get_rank(self.group), dist.get_world_size(self.group)

    def _exchange_group(self):
        return self.group if self.group is not None else host_group()

    def begin(
        self, prompts: Sequence[Prompt], step: int, finished: dict[tuple[str, int], Generation] | None = None
    ) -> None:
        """Starts to sample the first round of ``step`` beside whatever the caller does next.

        Args:
            finished: responses that exist already, by prompt id and sample index: only the others are sampled.

        Raises:
            RuntimeError: a batch is pending already.
        """
        if self.pending is not None:
            raise RuntimeError(f"the batch of step {self.pending.step} has not been taken up yet")
        jobs = self._jobs(prompts)
        known = {
            place: finished[prompt.id, sample]
            for place, (prompt, sample) in enumerate(jobs)
            if finished and (prompt.id, sample) in finished
        }
        asked = [place for place in range(len(jobs)) if place not in known]
        requests = self._requests([jobs[place] for place in asked], step, 0)
        handle = self.engine.start(requests, self.sampling)
        self.pending = PendingBatch(step, list(prompts), jobs, known, asked, requests, handle)

    def take_back_visits(
        self, table: ResponseTable, parts: Sequence[Iterable[int]], updates: Sequence[UpdateResult]
    ) -> None:
        """A visit counts where it reached an update: those of an update that was left out are taken back. The same on
        every rank; ``parts``: the rows of each update."""
        if self.history is None:
            return
        for rows, update in zip(parts, updates, strict=True):
            if not update.stepped:
                self.history.take_back({table.prompt_id(row) for row in rows})

    def drop_pending(self) -> None:
        """Gives up the pending batch, if there is one."""
        if self.pending is not None and self.pending.handle is not None:
            self.pending.handle.cancel()
        self.pending = None

    def _take_pending(self, step: int, progress) -> tuple[Sequence[Prompt], list[Response]]:
        batch, self.pending = self.pending, None
        assert batch is not None  # run() has looked
        if batch.step != step:
            raise RuntimeError(f"the pending batch is for step {batch.step}, and this is step {step}")
        with self.timeline.span("rollout"):
            try:
                if batch.handle is not None:
                    sampled = self.engine.finish(batch.handle, progress)
                else:
                    sampled = self.engine.generate(batch.requests, self.sampling, progress)
            except Stopped as stopped:
                # It stays pending, with what is finished: a checkpoint keeps it.
                batch.known |= {batch.asked[place]: generation for place, generation in stopped.finished.items()}
                batch.handle, self.pending = None, batch
                raise
            generations = batch.known | dict(zip(batch.asked, sampled, strict=True))
        with self.timeline.span("reward"):
            return batch.prompts, self._judge(batch.jobs, [generations[place] for place in range(len(batch.jobs))])

    def _jobs(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
        rank, world = self._world()
        if self.whole_prompts:
            return [
                (prompt, sample) for prompt in share(list(prompts), rank, world) for sample in range(self.group_size)
            ]
        return share([(prompt, sample) for prompt in prompts for sample in range(self.group_size)], rank, world)

    def _requests(self, jobs, step: int, round_number: int) -> list[GenerateRequest]:
        return [
            GenerateRequest(prompt.token_ids, stream_seed(self.seed, step, round_number, prompt.id, sample))
            for prompt, sample in jobs
        ]

    def _sample(self, prompts, step, round_number, progress) -> list[Response]:
        jobs = self._jobs(prompts)
        requests = self._requests(jobs, step, round_number)
        with self.timeline.span("rollout"):
            generations = self.engine.generate(requests, self.sampling, progress)
        with self.timeline.span("reward"):
            return self._judge(jobs, generations)

    def _judge(self, jobs, generations) -> list[Response]:
        responses = [
            response_of(
                prompt,
                sample,
                generation,
                self.tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True),
            )
            for (prompt, sample), generation in zip(jobs, generations, strict=True)
        ]
        rewards = self.rewarder.score([r.text for r in responses], [r.ground_truth for r in responses])
        for response, reward in zip(responses, rewards, strict=True):
            response.raw_reward = reward
            response.reward = reward
            response.correct = reward >= self.correct_at
        if self.objective.overlong_buffer:
            lengths = torch.tensor([len(r.token_ids) for r in responses])
            penalties = soft_overlong_penalty(lengths, self.sampling.max_new_tokens, self.objective.overlong_buffer)
            for response, penalty in zip(responses, penalties.tolist(), strict=True):
                response.reward = response.raw_reward + penalty
        return responses

    def _totals(self, mine: list[Response]) -> dict[str, float]:
        failures = sum(self.rewarder.failures.values())
        self.rewarder.failures.clear()
        names = ("reward", "correct", "tokens", "truncated", "reward_failures", "generated")
        columns: tuple[Iterable[Any], ...] = (
            (response.raw_reward for response in mine),
            (response.correct for response in mine),
            (len(response.token_ids) for response in mine),
            (response.finish_reason == "length" for response in mine),
        )
        sums = [*(math.fsum(column) for column in columns), failures, len(mine)]
        values = torch.tensor(sums, dtype=torch.float64)
        # The first meeting after sampling: who is done early waits here for the slowest rank.
        with self.timeline.span("rollout_wait"):
            dist.all_reduce(values, group=self._exchange_group())
            found = values.tolist()
        return dict(zip(names, found, strict=True))

    def _fill_advantages(self, kept: list[Response]) -> None:
        ids = [response.prompt_id for response in kept]
        rewards = torch.tensor([response.reward for response in kept], dtype=torch.float64)
        if self.objective.advantage == "sas":
            assert self.history is not None  # SAS has one
            advantages = self.history.observe(ids, rewards, self._exchange_group())
        else:
            advantages = group_advantages(
                ids, rewards, self.objective.advantage, self.objective.std_ddof, self._exchange_group()
            )
        for response, advantage in zip(kept, advantages.tolist(), strict=True):
            response.advantage = advantage

    def _union(self, ids) -> set[str]:
        payloads = all_gather_bytes(
            "\n".join(sorted({i.encode().hex() for i in ids})).encode(), self._exchange_group(), CPU
        )
        return {bytes.fromhex(line).decode() for payload in payloads for line in payload.decode().split("\n") if line}
