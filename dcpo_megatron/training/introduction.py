"""What a run says of its prompts and responses before the first step: whether they are what was meant, only the reader
can know.

first prompt, gsm8k/06a1ee61a3f25ce6, 31 tokens:
  | <|im_start|>user
  | How much?<|im_end|>
  | <|im_start|>assistant
  |
a response ends with <|endoftext|> (151643)
data.template=chat ends a turn with <|im_end|> (151645), which does not end a response: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcpo_megatron.data import Prompt
from dcpo_megatron.data.templates import choose_template, turn_end

if TYPE_CHECKING:
    from dcpo_megatron.training.loop import Trainer

_HEAD, _TAIL = 2000, 1000  # characters shown of a long prompt


def introduce(prompt: Prompt, tokenizer, stops: Sequence[int], template: str, stop_key: str) -> list[str]:
    """The lines: ``prompt`` as the model reads it, the tokens ``stops`` that end a response, and what is odd about
    them.

    ``template``: as in ``data.template``; ``stop_key``: how a further token is given, with ``{}`` for its number.
    """

    def name(token: int) -> str:
        return f"{_visible(str(tokenizer.convert_ids_to_tokens(token)))} ({token})"

    text = _visible(tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False))
    if len(text) > _HEAD + _TAIL:
        left_out = len(text) - _HEAD - _TAIL
        text = f"{text[:_HEAD]} [... {left_out:,} characters ...] {text[-_TAIL:]}"
    lines = [f"first prompt, {prompt.id}, {len(prompt.token_ids):,} tokens:"]
    lines += [f"  | {line}" for line in text.split("\n")]
    lines.append(f"a response ends with {' or '.join(map(name, stops))}")
    if prompt.token_ids[-1] in stops:
        lines.append(
            f"the prompt ends with {name(prompt.token_ids[-1])}, as a response does: see whether that is meant"
        )
    template = choose_template(template, tokenizer)
    end = turn_end(template, tokenizer)
    if end is not None and end not in stops:
        lines.append(
            f"template {template} ends a turn with {name(end)}, which does not end a response: one that writes it goes"
            f" on up to the longest length. If it should end there, set {stop_key.format(end)}"
        )
    return lines


def introduce_run(trainer: Trainer) -> None:
    """Says on rank 0 what is trained, on how many ranks, on which prompts."""
    run_, data, sinks, world = trainer.run_, trainer.data, trainer.monitors.sinks, dist.get_world_size()
    layout = run_.layout
    sinks.say(
        f"[bold]{run_.config.objective.get('preset', 'dcpo-paper')}[/bold] on {run_.shape.model_type},"
        f" {run_.shape.layers} layers of {run_.shape.hidden}; {world} ranks ({run_.platform.name},"
        f" {run_.platform.backend}): tensor {layout.tensor}, pipeline {layout.pipeline}, context {layout.context},"
        f" data {run_.data_parallel}"
    )
    # Rows left out are counted aloud, also without a console.
    sinks.announce(f"data: {data.prompts.summary()}")
    if data.held_out is not None:
        sinks.announce(f"evaluation: {data.held_out.summary()}")
    stops, template = data.stop_token_ids, run_.config.data.template
    key = f"rollout.stop_token_ids=[{','.join(map(str, [*run_.config.rollout.stop_token_ids, '{}']))}]"
    for line in introduce(data.prompts.prompts[0], data.tokenizer, stops, template, key):
        sinks.announce(line)


def _visible(text: str) -> str:
    """``text`` with what a terminal would not show, or would obey, as an escape; ends of lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
