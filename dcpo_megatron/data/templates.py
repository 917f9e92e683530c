r"""Chat messages to the text that the model continues.

| template | text | special tokens added by the tokenizer |
|---|---|---|
| chat | the tokenizer's own chat template, with the opening of the assistant's turn | no: the template writes them |
| qwen-math | ChatML with "Please reason step by step, and put your final answer within \boxed{}." | no: it has them |
| plain | message contents, a blank line between | before the text: a model beginning with a BOS token gets it, once |

A system prompt given in the options replaces that of the row. ``qwen-math`` is rendered here, so that it is the same
for a base model whose tokenizer has another chat template or none.
"""

from dcpo_megatron.data.errors import DataError
from dcpo_megatron.data.formats import BadRow

TEMPLATES = ("auto", "chat", "qwen-math", "plain")
QWEN_MATH_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."


def choose_template(name: str, tokenizer) -> str:
    """The template that is meant: "auto" is chat if the tokenizer has a chat template, else plain.

    Raises DataError for "chat" with a tokenizer that has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name == "auto":
        return "chat" if has_chat else "plain"
    if name == "chat" and not has_chat:
        raise DataError("the tokenizer has no chat template: set data.template to qwen-math or plain")
    return name


def tokenise(text: str, template: str, tokenizer) -> list[int]:
    """The tokens of a rendered prompt. A special token that the tokenizer would add is not added twice, and none behind
    the text: the model goes on from there."""
    if template != "plain":
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    found = tokenizer(text, return_special_tokens_mask=True)
    added, tokens = found["special_tokens_mask"], found["input_ids"]
    if 0 not in added:
        return []
    begin, end = added.index(0), len(added) - added[::-1].index(0)
    front, rest = tokens[:begin], tokens[begin:end]
    return rest if rest[: len(front)] == front else front + rest


def turn_end(template: str, tokenizer) -> int | None:
    """The token with which the template ends the assistant's turn: the first special one behind its text. None where
    there is none to be seen."""
    if template == "plain":
        return None
    ask, said = {"role": "user", "content": "A question?"}, "The whole answer."
    turns = [ask, {"role": "assistant", "content": said}]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    # The end of a conversation first: a template may end its earlier turns otherwise, or end a turn by the opening of
    # the next one alone.
    for messages in (turns, [*turns, ask]):
        try:
            _, found, behind = render(messages, template, tokenizer, answer=False).rpartition(said)
        except BadRow:
            continue
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if found and token in special:
                return token
    return None


def render(
    messages: list[dict[str, str]], template: str, tokenizer, system_prompt: str | None = None, answer: bool = True
) -> str:
    """The text of one prompt, with the opening of an ``answer`` behind it. ``template`` comes from ``choose_template``.
    Raises BadRow if the chat template refuses it."""
    if system_prompt is None and template == "qwen-math":
        system_prompt = QWEN_MATH_SYSTEM
    if system_prompt is not None:
        rest = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system_prompt}, *rest] if system_prompt else rest
    if template == "plain":
        return "\n\n".join(message["content"] for message in messages)
    if template == "qwen-math":
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + "<|im_start|>assistant\n" * answer
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        cause = str(error).split("\n", 1)[0]
        raise BadRow(
            "refused by the chat template", f"is refused by the chat template ({cause}): correct its messages or roles"
        ) from error
