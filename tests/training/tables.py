"""Tables of responses for tests, as one rank would have them."""

from types import SimpleNamespace

from dcpo_megatron.data import Response, ResponseTable
from dcpo_megatron.data.response_table import rows_of, table_of


def table_of_responses(responses: list[Response], version: int = 0) -> ResponseTable:
    """Of responses that lie prompt by prompt in sampling order."""
    ids = {response.prompt_id: response.prompt_token_ids.tolist() for response in responses}
    prompts = [SimpleNamespace(id=prompt_id, token_ids=tokens) for prompt_id, tokens in ids.items()]
    return table_of(prompts, [rows_of(responses, prompts, version)])
