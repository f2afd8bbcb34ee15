"""Conversations as tokens: the ChatML form of Nanbeige4 (released chat template), written twice.

`render` is what training and sampling use: control tokens are put in by id, so that one written in a message stays
text. `CHAT_TEMPLATE` is the same as Jinja, for exports: other programs render it to text first and cannot tell the two
apart. A message is {"role": "system" | "user" | "assistant", "content": str}; an assistant's may have "reasoning": str.
"""
from common import UserError

CHAT_TEMPLATE = r"""
{%- set turn = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set turn.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning and message.role == 'assistant' and loop.index0 > turn.last_user %}
        {{- '<think>\n' + message.reasoning + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


def render(messages: list[dict], tokenizer, add_generation_prompt: bool = False) -> list[int]:
    """Token ids of a conversation; with add_generation_prompt the assistant's next turn is opened at the end.

    Reasoning is kept in the turns after the last user message and dropped before it (as released). Without reasoning
    there is no <think> block (our choice). Raises UserError for an unknown role or a tokenizer without these controls.
    """
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    parts = []  # control token, text, control token, text, …: joined, they are what CHAT_TEMPLATE writes
    for i, message in enumerate(messages):
        role, reasoning = message["role"], message.get("reasoning")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {i} has the unknown role {role!r}")
        parts += ["<|im_start|>", role + "\n"]
        if reasoning and role == "assistant" and i > last_user:
            parts += ["<think>", "\n" + reasoning + "\n", "</think>", "\n\n"]
        parts[-1] += message["content"]
        parts += ["<|im_end|>", "\n"]
    if add_generation_prompt:
        parts += ["<|im_start|>", "assistant\n"]
    ids = []
    for control, text in zip(parts[::2], parts[1::2]):
        if control not in tokenizer.special:
            raise UserError(f"{tokenizer.name} has no {control} token: it is not made for chats")
        ids += [tokenizer.special[control], *tokenizer.encode(text)]
    return ids


def parse(answer: list[int], tokenizer) -> dict:
    """The assistant message that sampled tokens say (without their stop token): what `render` is the inverse of."""
    end = tokenizer.special.get("</think>")
    if end not in answer:
        return {"role": "assistant", "content": tokenizer.decode(answer)}
    cut = answer.index(end)
    reasoning = [token for token in answer[:cut] if token != tokenizer.special["<think>"]]
    return {"role": "assistant", "reasoning": tokenizer.decode(reasoning).strip("\n"),
            "content": tokenizer.decode(answer[cut + 1:]).lstrip("\n")}
