"""Code blocks in a model's reply, by the fences that people and models write.

A fence is three or more ` or ~. It opens a block where it begins a line, behind spaces or a list
marker ("1. ", "- "), or where at most one word, the language, follows it on its line ("Here it is:
```python"; ` alone). A block ends where a line begins with a fence at least as long, not indented
by four or more columns behind the opening one (a docstring's own), or where a line of code ends
with one; a fence with a language there opens the next block. One that is never closed goes on to
the end. Of its lines the opening fence's indentation is taken away.
"""
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FENCE = re.compile(r"`{3,}+|~{3,}+")
MARGIN = re.compile(r"[ \t]*+(?:(?:[-*+]|[0-9]{1,3}[.)])[ \t]++)?")
LANGUAGE = re.compile(r"[ \t]*+[{.]*+(\w*+)")
PYTHON = ("python", "python3", "py")


@dataclass
class Block:
    start: int      # where its opening fence stands in the text
    fence: str
    margin: int     # columns before the fence; 0 behind words
    language: str   # in lower case; "" for none
    lines: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        if not self.margin:
            return "\n".join(self.lines) + "\n"
        first_line = next((line for line in self.lines if line.strip()), "")
        margin = min(self.margin, indentation(first_line))
        return "".join(line[min(margin, indentation(line)):] + "\n" for line in self.lines)


def fenced_blocks(text: str) -> Iterator[Block]:
    """The blocks of a text, in order; its time grows with the text's length."""
    block, start = None, 0
    for line in text.split("\n"):
        end = None if block is None else end_of_code(block, line)
        if block is None:
            block = open_block(line, start)
        elif end is None:
            block.lines.append(line)
        else:
            if end:
                block.lines.append(line[:end])
            yield block
            following = open_block(line, start)
            block = following if following and following.language and not end else None
        start += len(line) + 1
    if block:
        yield block


def open_block(line: str, start: int) -> Block | None:
    """The block that a line opens; None for none. start: where in the text the line begins."""
    fence = FENCE.search(line)
    if fence is None:
        return None
    before, behind = line[:fence.start()], line[fence.end():]
    begins_line = MARGIN.fullmatch(before)
    ends_line = fence[0][0] == "`" and len(behind.split()) <= 1
    if fence[0][0] in behind or not (begins_line or ends_line):
        return None
    margin = len(before) if begins_line else 0
    language = LANGUAGE.match(behind)[1].lower()
    return Block(start + len(before), fence[0], margin, language)


def end_of_code(block: Block, line: str) -> int | None:
    """How much of a line is still code of the block that ends in it; None: it does not end."""
    indent = indentation(line)
    if line.startswith(block.fence, indent):
        return 0 if indent <= block.margin + 3 else None
    stripped = line.rstrip()
    code = stripped.rstrip(block.fence[0])
    ends_line = len(stripped) - len(code) >= len(block.fence)
    return len(code) if ends_line and block.fence not in code else None


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))
