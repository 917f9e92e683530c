"""The embedded engine: Hugging Face transformers inside the trainer's own process. The default where there is no
server.

Prompts are padded on the left, prefilled once per distinct prompt, and decoded together with a key-value cache;
finished rows leave the batch. Every response draws from a random stream of its own (one uniform number a token, turned
into a token by the inverse of the cumulative distribution), so that it depends on its seed and the weights only, not on
the rank or the batch that it was sampled in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from dcpo_megatron.rollout.protocol import GenerateRequest, Generation, RolloutError, SamplingParams, StartedBatch


class EmbeddedEngine:
    """Samples with a transformers model on ``device``.

    Args:
        folder: Hugging Face folder; its ``config.json`` gives the architecture, and its weights are loaded where
            ``load`` is true.
        dtype: of the weights.
        max_batch: responses decoded together; bounds the cache's memory.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 256,
        load: bool = True,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        if load:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        else:
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, local_files_only=True), dtype=dtype
            )
        self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.max_batch = max_batch
        self.version = 0
        self._usable = load

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See :class:`RolloutEngine`. Raises RolloutError for an unknown name, another shape, or a weight that did not
        come."""
        self._usable = False
        mine = self._places()
        # With tied embeddings lm_head.weight is the embedding itself and need not come.
        waiting = set(mine) - ({"lm_head.weight"} if self.model.config.tie_word_embeddings else set())
        problem = None
        with torch.no_grad():
            for name, tensor in tensors:
                # Keep walking after a problem: the tensors come from collectives that every rank must finish.
                target = mine.get(name)
                if target is None:
                    problem = problem or f"weight {name!r} has no place in the rollout model"
                elif target.shape != tensor.shape:
                    came, wanted = tuple(tensor.shape), tuple(target.shape)
                    problem = problem or f"weight {name!r} has shape {came}, the rollout model has {wanted}"
                else:
                    target.copy_(tensor)
                    waiting.discard(name)
        if problem is None and waiting:
            problem = f"weight {min(waiting)!r} did not come ({len(waiting)} missing)"
        if problem:
            raise RolloutError(
                f"{problem}: the rollout engine keeps no half-updated weights and will not sample until a complete"
                " update"
            )
        self.version = version
        self._usable = True

    def _places(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the tensor to fill. transformers holds a layer's experts in one tensor; checkpoints name
        each expert, and transformers says how."""
        from transformers.core_model_loading import revert_weight_conversion

        mine = {name: parameter.detach() for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        places = revert_weight_conversion(self.model, dict(mine))
        storages = {tensor.untyped_storage().data_ptr() for tensor in mine.values()}
        for name, place in places.items():
            if place.untyped_storage().data_ptr() not in storages:
                raise RolloutError(
                    f"transformers gives {name!r} as a copy, not as a part of its model's weights: new weights would"
                    f" not reach the rollout model of type {self.model.config.model_type}"
                )
        return places

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        sampling: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """See :class:`RolloutEngine`."""
        if not self._usable:
            raise RolloutError("the rollout engine has no complete weights: call load_weights first")
        results: list[Generation] = []
        for start in range(0, len(requests), self.max_batch):
            batch = requests[start : start + self.max_batch]

            def report(finished: int, start: int = start) -> None:
                if progress is not None:
                    progress(start + finished, len(requests))

            with torch.inference_mode():
                results += self._generate_batch(batch, sampling, report)
        return results

    def _generate_batch(
        self, requests: Sequence[GenerateRequest], sampling: SamplingParams, report
    ) -> list[Generation]:
        prompts = list(dict.fromkeys(request.prompt_token_ids for request in requests))
        place = {prompt: number for number, prompt in enumerate(prompts)}
        rows = torch.tensor([place[request.prompt_token_ids] for request in requests], device=self.device)
        logits, cache, mask = self._prefill(prompts)
        logits, mask = logits[rows], mask[rows]
        cache.batch_select_indices(rows)

        streams = torch.stack([_uniform_stream(request.seed, sampling.max_new_tokens) for request in requests]).to(
            self.device
        )
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=self.device)
        count = len(requests)
        tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(count, sampling.max_new_tokens, dtype=torch.float32, device=self.device)
        lengths = torch.zeros(count, dtype=torch.long, device=self.device)
        stopped = torch.zeros(count, dtype=torch.bool, device=self.device)
        alive = torch.arange(count, device=self.device)
        for step in range(sampling.max_new_tokens):
            chosen, chosen_logprobs = sample(logits, streams[alive, step], sampling)
            tokens[alive, step], logprobs[alive, step] = chosen, chosen_logprobs
            lengths[alive] = step + 1
            ended = torch.isin(chosen, stops)
            stopped[alive] = ended
            keep = (~ended).nonzero(as_tuple=True)[0]
            if len(keep) == 0 or step + 1 == sampling.max_new_tokens:
                break
            if len(keep) < len(alive):
                alive, chosen, mask = alive[keep], chosen[keep], mask[keep]
                cache.batch_select_indices(keep)
                report(count - len(alive))
            mask = torch.cat((mask, mask.new_ones(len(alive), 1)), dim=1)
            out = self.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=(mask.sum(1) - 1)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1].float()
        report(count)
        all_tokens, all_logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
        return [
            Generation(
                token_ids=all_tokens[i, :n].astype(np.int32),  # a copy: the padded rows go
                logprobs=all_logprobs[i, :n].copy(),
                finish_reason="stop" if done else "length",
                weight_versions=np.full(n, self.version),
            )
            for i, (n, done) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
        ]

    def _prefill(self, prompts: Sequence[tuple[int, ...]]):
        from transformers import DynamicCache

        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            mask[number, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=self.model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values, mask

    def start(self, requests: Sequence[GenerateRequest], sampling: SamplingParams) -> None:
        """None: it samples in the caller's time."""

    def finish(self, started: StartedBatch, progress: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Raises RuntimeError: nothing is ever started."""
        raise RuntimeError("the embedded engine starts no batch: call generate")

    def release_memory(self) -> None:
        """It keeps its copy of the model."""

    def close(self) -> None:
        """Drops the model."""
        self.model = None
        self._usable = False


def sample(logits: torch.Tensor, uniforms: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row: ``logits`` [n, V] fp32, ``uniforms`` [n] in [0, 1) -> ``(tokens [n], logprobs [n])``.

    Log-probs are those of the whole distribution at the sampling temperature (at 1 for greedy), whatever top-p and
    top-k leave out.
    """
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return tokens, logp.gather(1, tokens[:, None])[:, 0]
    logp = (logits / sampling.temperature).log_softmax(-1)
    probs = logp.double().exp()
    if sampling.top_k or sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        if sampling.top_k:
            drop[:, sampling.top_k :] = True
        probs = probs.scatter(1, order, ordered.masked_fill(drop, 0.0))
    cumulative = probs.cumsum(-1)
    tokens = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding may place u * total on the total itself: the last token with any probability is meant then.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).double().argmax(-1)
    tokens = torch.minimum(tokens, last)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _uniform_stream(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)
