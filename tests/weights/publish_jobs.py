"""What the ranks of a training job do to publish, and a trainer that is killed in the middle of it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

SEQUENCES = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]
CPU = torch.device("cpu")


class HfProbe:
    """The log-probs of the Hugging Face model in ``folder``."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def sequences(self) -> list[list[int]]:
        return SEQUENCES

    @torch.no_grad()
    def logprobs(self) -> list[list[float]]:
        found = []
        for ids in SEQUENCES:
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append([rows[place, token].item() for place, token in enumerate(ids[1:])])
        return found


def publish(folder: str, parallel: dict, urls: list[str], run_id: str, version: int, options: dict) -> dict:
    """Publishes ``folder``'s weights from a sharded model: what this rank knows then, and the error if there was
    one."""
    from dcpo_megatron.rollout import RolloutError
    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server
    from dcpo_megatron.training.publish_probe import TrainingProbe
    from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher
    from dcpo_megatron.weights.transfer import WeightGatherer
    from tests.weights.jobs import _policy

    policy = _policy(folder, parallel)
    fleet = Fleet([Server(url) for url in urls], run_id)
    probe = TrainingProbe(policy, [SimpleNamespace(token_ids=tuple(ids)) for ids in SEQUENCES])
    publisher = WeightPublisher(fleet, PublishOptions(**options), device=CPU, probe=probe)
    error = report = None
    try:
        report = publisher.publish(WeightGatherer(policy), version)
    except RolloutError as caught:
        error = str(caught)
    finally:
        publisher.close()
    return {"state": fleet.state(), "report": report, "error": error, "logprobs": probe.logprobs()}


def die_between_pause_and_resume(folder: str, url: str) -> None:
    """A trainer that is gone, by SIGKILL, when half of the weights are sent."""
    from safetensors.torch import load_file

    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server
    from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher

    def tensors():
        weights = load_file(Path(folder) / "model.safetensors")
        for number, item in enumerate(weights.items()):
            if number == len(weights) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    fleet = Fleet([Server(url)], "killed")
    options = PublishOptions(bucket_bytes=20_000, timeout=20.0, bucket_timeout=10.0)
    WeightPublisher(fleet, options, device=CPU, probe=HfProbe(folder)).publish(tensors(), 1)


if __name__ == "__main__":
    die_between_pause_and_resume(*sys.argv[1:])
