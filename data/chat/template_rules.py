"""The Jinja of chat templates: transformers' rules, in a sandbox; imports nothing of ours.

The sandbox keeps a template from Python, but not from loops without an end. So each is tried out
first, on a few conversations, in a process that has limits (untrusted.py).
"""
import functools
import json
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MOST_ADDED = 1_000_000  # characters that a template may write, and besides
MOST_FACTOR = 100       # … for each one of the conversation


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which transformers finds what to train: nothing
    but what stands inside."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without a way to Python's own attributes."""

    def __setitem__(self, name: str, value) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace must not have {name}")
        super().__setitem__(name, value)


def _namespace(*args, **attributes) -> Namespace:
    namespace = Namespace()
    for name, value in dict(*args, **attributes).items():
        namespace[name] = value
    return namespace


class TooLong(jinja2.TemplateError):
    pass


def _raise(message):
    # As a text at once, while limits hold: an object's may be long, or nested too deeply to be made
    raise jinja2.TemplateError(f"{message}")


def _as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@functools.cache
def compile_template(text: str) -> jinja2.Template:
    """A template, by transformers' rules; Jinja's own error where it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _as_json  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _namespace
    environment.globals["dict"] = lambda *args, **items: dict(*args, **items)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def write(text: str, conversation: dict, tokens: dict[str, str]) -> str:
    """What a template's text makes of a conversation; TooLong where it is far longer than that.

    conversation: messages, and maybe tools and add_generation_prompt. tokens: names of control
    tokens. Raises whatever Jinja, a template's author and Python may raise.
    """
    variables = dict(tools=None, documents=None, add_generation_prompt=False) | conversation
    written = compile_template(text).render(variables | tokens)
    most = MOST_ADDED + MOST_FACTOR * len(json.dumps(conversation))
    if len(written) > most:
        raise TooLong(f"it writes {len(written):,} characters, where {most:,} are plenty")
    return written


def conversations() -> list[dict]:
    """What a template is tried on."""
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "What is 1 + 1?"}
    answer = {"role": "assistant", "content": "2"}
    function = {"name": "add", "arguments": {"a": 1, "b": 1}}
    call = {"role": "assistant", "content": "",
            "tool_calls": [{"type": "function", "function": function}]}
    tool = {"type": "function", "function": {
        "name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}
    return [
        dict(messages=[question], add_generation_prompt=True),
        dict(messages=[system, question, answer]),
        dict(messages=[question, answer | {"reasoning_content": "1 + 1 = 2."}] * 10),
        dict(messages=[question | {"content": "so " * 5000}], add_generation_prompt=True),
        dict(messages=[question, call, {"role": "tool", "content": "2"}, answer], tools=[tool]),
    ]


def main(template_json: str) -> None:
    """Writes conversations by each text of a template; raises where memory runs out, or too much
    is written.

    template_json: "texts" and "tokens" of a foreign.ChatTemplate. What a template refuses is no
    fault here: that is said where it is used.
    """
    template = json.loads(template_json)
    for text in template["texts"].values():
        for conversation in conversations():
            try:
                write(text, conversation, template["tokens"])
            except (MemoryError, TooLong):
                raise
            except Exception:
                pass
