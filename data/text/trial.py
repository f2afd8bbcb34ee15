"""Tries a tokenizer.json in a process of its own: what ends that process is a message in this one.

`tokenizers` takes most faults of a file as an exception, but aborts where memory runs out, and a
pattern may backtrack without end. The child, which imports nothing of the project, has limits of
memory and time and meets texts that such patterns and normalizers stumble over.
"""
import resource
import subprocess
import sys
from pathlib import Path

MEMORY = 2 << 30   # bytes of address space; a vocabulary of 166,000 ids does with half of it
SECONDS = 10       # of CPU time; the same vocabulary takes 1.2 s
MOST_TOKENS = 16   # for each byte of a text


def why_not(tokenizer_json: str, memory: int = MEMORY) -> str:
    """Why a file cannot serve; "" if the child could use it."""
    try:
        child = subprocess.run(
            [sys.executable, "-I", str(Path(__file__)), str(memory)], input=tokenizer_json.encode(),
            capture_output=True, timeout=10 * SECONDS,
            env={"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    except subprocess.TimeoutExpired:
        return f"it did not come to an end in {10 * SECONDS} s"
    if child.returncode == 0:
        return ""
    if child.returncode == 1:
        return child.stdout.decode("utf-8", "replace") or "the process that tried it failed"
    return (f"it ended the process that tried it (exit code {child.returncode}: more than "
            f"{memory >> 20} MB of memory, {SECONDS} s, or a crash)")


def texts() -> list[str]:
    """Plain ones, and each printable sign of ASCII many times over, alone and with others."""
    signs = [chr(code) for code in range(32, 127)] + ["\n", "\t", "é", "你", "▁", "🙂", "\u0301"]
    hostile = []
    for sign in signs:
        hostile += [sign * 300, sign * 40 + "!\n", f"a{sign}" * 100]
    longer = [sign * 4000 for sign in "a 0.\n"]
    return ["a", "Hello, world! 123 naïve 你好\n\n  x = 1", "".join(signs), *hostile, *longer]


def try_out(tokenizer_json: str) -> None:
    """Uses the file in the ways that we do; raises what it raises."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    for deaf in (True, False):
        tokenizer.encode_special_tokens = deaf
        for text in texts():
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) > MOST_TOKENS * len(text.encode()) + 100:
                raise ValueError(f"it makes {len(ids):,} tokens of {len(text)} characters")


def main() -> None:
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        try_out(sys.stdin.read())
    except BaseException as error:  # a PanicException of Rust is no Exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        sys.stdout.buffer.write(reason.encode("utf-8", "replace"))
        sys.exit(1)


if __name__ == "__main__":
    main()
