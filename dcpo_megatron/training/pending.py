"""A batch that is being sampled while another one trains, and its form in a checkpoint.

    pending.json                  {"step": 12, "prompts": [id, ...]}          the same on every rank
    pending-R.responses           what rank R's engine had finished (encode_responses)

Only finished responses are kept: a resumed run samples the others anew, under the weights that it has then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcpo_megatron.checkpoint.folder import write_text
from dcpo_megatron.data import Prompt, Response, decode_responses, encode_responses
from dcpo_megatron.files import sync
from dcpo_megatron.rollout import GenerateRequest, Generation, StartedBatch

PENDING_FILE = "pending.json"


@dataclass
class PendingBatch:
    """This rank's share of the first round of ``step``.

    ``jobs``: (prompt, sample index) of each response; ``known``: those that were finished before the engine was asked,
    by place in ``jobs``; ``asked``: the places of the others, in the order of ``requests``. ``handle`` is None where
    the engine samples only when it is waited for.
    """

    step: int
    prompts: list[Prompt]
    jobs: list[tuple[Prompt, int]]
    known: dict[int, Generation]
    asked: list[int]
    requests: list[GenerateRequest]
    handle: StartedBatch | None

    def finished(self) -> list[Response]:
        """Everything that is finished now, not judged yet."""
        done = dict(self.known)
        if self.handle is not None:
            done |= {self.asked[place]: found for place, found in self.handle.done_so_far().items()}
        return [response_of(*self.jobs[place], generation) for place, generation in sorted(done.items())]

    def write(self, finished: list[Response], folder: Path, rank: int) -> None:
        """Writes :meth:`finished` responses of this rank, and on rank 0 the plan."""
        file = folder / f"pending-{rank:05d}.responses"
        file.write_bytes(encode_responses(finished))
        sync(file)
        if rank == 0:
            plan = {"step": self.step, "prompts": [prompt.id for prompt in self.prompts]}
            write_text(folder / PENDING_FILE, json.dumps(plan))


def read_pending(
    folder: Path, prompts: list[Prompt]
) -> tuple[int, list[Prompt], dict[tuple[str, int], Generation]] | None:
    """What :meth:`PendingBatch.write` left in a checkpoint, of all ranks that wrote it: step, prompts, finished
    responses by (prompt id, sample index).

    None where no batch was pending.
    """
    file = folder / PENDING_FILE
    if not file.is_file():
        return None
    plan = json.loads(file.read_text(encoding="utf-8"))
    by_id = {prompt.id: prompt for prompt in prompts}
    finished = {
        (response.prompt_id, response.sample_index): Generation(
            response.token_ids, response.rollout_logprobs, response.finish_reason, response.weight_versions
        )
        for part in sorted(folder.glob("pending-*.responses"))
        for response in decode_responses(part.read_bytes())
    }
    return plan["step"], [by_id[prompt_id] for prompt_id in plan["prompts"]], finished


def response_of(prompt: Prompt, sample: int, generation: Generation, text: str = "") -> Response:
    """What an engine sampled for ``prompt``, not judged yet."""
    return Response(
        prompt_id=prompt.id,
        prompt_token_ids=np.array(prompt.token_ids, dtype=np.int32),
        ground_truth=prompt.ground_truth,
        sample_index=sample,
        token_ids=generation.token_ids,
        rollout_logprobs=generation.logprobs,
        finish_reason=generation.finish_reason,
        weight_versions=generation.weight_versions,
        text=text,
        data_source=prompt.data_source,
    )
