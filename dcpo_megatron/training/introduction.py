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

from dcpo_megatron.data import Prompt
from dcpo_megatron.data.templates import choose_template, turn_end

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


def _visible(text: str) -> str:
    """``text`` with what a terminal would not show, or would obey, as an escape; ends of lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
