"""How a tokenizer.json is tried out before tokenizer.py uses it; imports nothing of ours.

`tokenizers` takes most faults of a file as an exception, but aborts where memory runs out, and a
pattern may backtrack without end. Here, in a process that has limits (untrusted.py), it meets texts
that such patterns and normalizers stumble over.
"""
import json

MOST_TOKENS = 16   # for each byte of a text


def texts() -> list[str]:
    """Plain ones, and each printable sign of ASCII many times over, alone and with others."""
    signs = [chr(code) for code in range(32, 127)] + ["\n", "\t", "é", "你", "▁", "🙂", "\u0301"]
    hostile = []
    for sign in signs:
        hostile += [sign * 300, sign * 40 + "!\n", f"a{sign}" * 100]
    longer = [sign * 4000 for sign in "a 0.\n"]
    return ["a", "Hello, world! 123 naïve 你好\n\n  x = 1", "".join(signs), *hostile, *longer]


def main(tokenizer_json: str) -> None:
    """Uses the file in the ways that we do; raises what it raises."""
    import tokenizers
    json.loads(tokenizer_json)  # as the parent will: a small file may take much memory
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for deaf in (True, False):
        tokenizer.encode_special_tokens = deaf
        for text in [*texts(), *names]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) > MOST_TOKENS * len(text.encode()) + 100:
                raise ValueError(f"it makes {len(ids):,} tokens of {len(text)} characters")
