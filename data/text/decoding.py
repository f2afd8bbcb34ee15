"""Bytes to text: which encoding a file is in, and its lines, of which none fills the memory.

A file is UTF-8, or UTF-16 or UTF-32 where a byte order mark says so (of UTF-16 also zeros in every
other byte). Any other is refused by name: what is guessed wrongly is trained as mojibake.
"""
import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

MARKS = {  # byte order mark -> encoding; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MOST_LINE = 32 << 20     # bytes of a line that holds a record: parsed, it may take 28 times as many
MOST_SKIPPED = 8         # times as many, at which a line without end ends the reading
MOST_WRONG = 1e-3        # share of characters that are no UTF-8: more, and it is another encoding


def encoding_of(beginning: bytes) -> str:
    """A file's encoding, by its first bytes."""
    for mark, encoding in MARKS.items():
        if beginning.startswith(mark):
            return encoding
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        n_zeros = beginning[first::2].count(0)  # of letters of Latin scripts, one byte of two
        if n_zeros > 0.3 * len(beginning) and not beginning[1 - first::2].count(0):
            return encoding
    return "utf-8"


def as_utf8(file: BinaryIO) -> BinaryIO:
    """The file, or what it holds in UTF-8 if that is UTF-16 or UTF-32; bad bytes become U+FFFD.

    file: one with peek(), at its beginning.
    """
    encoding = encoding_of(file.peek(1024)[:1024])
    return file if encoding == "utf-8" else io.BufferedReader(_Recoded(file, encoding))


class _Recoded(io.RawIOBase):
    """A file in another encoding, read as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        self.text = io.TextIOWrapper(file, encoding, errors="replace", newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.text.read(len(buffer) // 4).encode("utf-8", "replace")  # four bytes at most
        buffer[:len(data)] = data
        return len(data)


def decode(data: bytes) -> tuple[str, str]:
    """(text of UTF-8, what is wrong with it: "" for nothing); a few bad bytes become U+FFFD.

    ValueError where so many are bad that it is another encoding.
    """
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    text = data.decode("utf-8-sig", errors="replace")
    n_wrong = text.count("\ufffd")
    if n_wrong > MOST_WRONG * len(text) + 1:
        raise ValueError(f"line {line}: neither UTF-8 nor UTF-16; convert the file, for example by "
                         "`iconv -f LATIN1 -t UTF-8`")
    return text, f"line {line}: not UTF-8; {n_wrong} such bytes become U+FFFD"


def lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one of more than MOST_LINE bytes. ValueError where it has no
    end."""
    while line := file.readline(MOST_LINE):
        if len(line) < MOST_LINE or line.endswith(b"\n"):
            yield line
            continue
        for _ in range(MOST_SKIPPED):
            line = file.readline(MOST_LINE)
            if len(line) < MOST_LINE or line.endswith(b"\n"):
                break
        else:
            raise ValueError(f"it has a line of more than {MOST_SKIPPED * MOST_LINE >> 20} MB")
        yield None
