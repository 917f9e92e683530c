"""A small Qwen2-shaped model made from nothing, and its supervised warm-up: the starting point of the demo, where a
pretrained model would stand.

Plain transformers and PyTorch, one process; the result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_END = "<|endoftext|>"
_BOX = "\\boxed{"
_CHARACTERS = "0123456789+=}"


def make_tokenizer(characters: str = _CHARACTERS):
    """A Qwen2 tokenizer (byte-level, as ``AutoTokenizer`` builds it for this architecture) that knows ``characters``
    and ``\\boxed{...}``.

    One token a character, one for the opening of the box, and ``<|endoftext|>``, which ends a response.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    vocab = {_END: 0} | {character: number for number, character in enumerate(characters, start=1)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=_END, eos_token=_END, pad_token=_END)
    tokenizer.add_tokens([AddedToken(_BOX, normalized=False)])
    return tokenizer


def make_model(
    vocab: int, *, seed: int, layers: int = 2, hidden: int = 320, heads: int = 4, kv_heads: int = 2, positions: int = 64
):
    """A Qwen2 model with random weights, fp32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).float()


def warm_up(
    model,
    tokenizer,
    examples: Sequence[tuple[str, str]],
    unseen: Sequence[tuple[str, str]],
    *,
    target_accuracy: float,
    seed: int,
    batch: int = 128,
    lr: float = 2e-3,
    max_steps: int = 4000,
    check_every: int = 10,
    check_examples: int = 512,
    progress: Callable[[int, float, float], None] | None = None,
) -> tuple[int, float]:
    """Supervised steps on ``(prompt, response)`` pairs until sampling at temperature 1 gives the very response
    ``target_accuracy`` of the time on ``unseen`` pairs, which are not trained on.

    ``progress(step, loss, accuracy)`` is called at every check. Returns ``(steps, accuracy at the last check)``.

    Raises:
        RuntimeError: the target was not reached within ``max_steps``.
    """
    order = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, checks = (
        [(tokenizer(p)["input_ids"], tokenizer(r)["input_ids"] + [tokenizer.eos_token_id]) for p, r in pairs]
        for pairs in (examples, unseen)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    accuracy = 0.0
    model.train()
    for step in range(1, max_steps + 1):
        ids, labels = _collate(order.sample(rows, min(batch, len(rows))))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % check_every == 0:
            accuracy = _sampled_accuracy(model, order.sample(checks, min(check_examples, len(checks))), generator)
            if progress is not None:
                progress(step, float(loss.detach()), accuracy)
            if accuracy >= target_accuracy:
                model.eval()
                return step, accuracy
    raise RuntimeError(
        f"the warm-up reached {accuracy:.2f} of {target_accuracy:.2f} in {max_steps} steps: use a larger model or an"
        " easier task"
    )


def _collate(rows):
    longest = max(len(p) + len(r) for p, r in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for number, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        ids[number, :length] = torch.tensor(prompt + response)
        labels[number, len(prompt) : length] = torch.tensor(response)
    return ids, labels


@torch.no_grad()
def _sampled_accuracy(model, rows, generator) -> float:
    """Probability of the right response, token by token, turned into right or wrong by one draw each: sampling without
    decoding."""
    ids, labels = _collate(rows)
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    picked = logp.gather(2, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted < 0, 0.0).sum(1)
    return float((torch.rand(len(rows), generator=generator) < picked.exp()).float().mean())


def save(model, tokenizer, folder: str | os.PathLike) -> None:
    """Writes a Hugging Face folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
