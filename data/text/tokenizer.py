"""Text to token ids and back: a byte-level BPE or a character vocabulary trained here, or any Llama- or GPT-type one.

A tokenizer is one plain file, Hugging Face's tokenizer.json. Two libraries work on it: `tokenizers` trains and reads
every such file; tiktoken encodes faster and on threads, but is used only where its ids are proven equal (`_ranks`).
Control tokens are put in by id, never by text: "<|im_end|>" written in a text stays text.
"""
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from common import UserError, write_atomic

# Nanbeige4's control tokens (their ids are our own); "<s>" begins and "<|endoftext|>" ends each document: our choice.
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # programs read these in the decoded text
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *MARKUP]
BOS = ["<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<|endoftext|>"]  # first found
EOT = ["<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"]

# How a text is cut before merging. bpe: like GPT-4's, but every digit alone, which arithmetic needs. char: every
# character alone, so that merges only build those of several bytes. Both libraries' regex engines read both alike.
PATTERNS = {
    "bpe": r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "char": r"[\s\S]",
}


@dataclass
class TokenizerConfig:
    kind: str = "bpe"            # "bpe" or "char"
    vocab_size: int = 2048       # ids in all: 256 bytes, merges, 10 control tokens (fewer if the text has fewer)
    train_mb: float = 8.0        # megabytes of text, taken from all pools alike, that it is trained on
    path: str = ""               # an existing tokenizer.json to use; nothing is trained then


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


SYMBOLS = _byte_symbols()
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


class Tokenizer:
    """Made by `train_tokenizer` or `Tokenizer.load`.

    n_vocab: ids are 0 .. n_vocab-1. special: name -> id of the control tokens. bos, eot: begin and end a document;
    im_start, im_end: begin and end a chat turn. hash: 16 hex digits over all that decides ids, for shards, checkpoints.
    byte_lengths: (n_vocab,) int32, UTF-8 bytes that each token stands for, 0 for control tokens: for bits per byte.
    pieces: those bytes. json: the tokenizer.json itself.
    """

    def __init__(self, text: str, name: str = "tokenizer"):
        """text: a tokenizer.json; name: what errors call it. Raises UserError where it cannot serve."""
        try:
            spec = json.loads(tokenizers.Tokenizer.from_str(text).to_str())  # also brings old files to today's form
            assert spec["model"]["type"] == "BPE"
        except Exception as error:  # tokenizers raises plain Exception
            why = str(error).splitlines()[0] if str(error) else "it is no BPE"
            raise UserError(f"{name} is not a tokenizer.json of a Llama- or GPT-type tokenizer: {why}") from None
        self.json, self.name = text, name
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]
                        if token["special"] or token["content"] in SPECIAL_TOKENS}
        meaning = [spec["model"], spec["normalizer"], spec["pre_tokenizer"], sorted(added.items())]
        self.hash = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]
        self._set_pieces(spec, added)
        self._hf = _without_control_tokens(spec, self.special)
        ranks = _ranks(spec, self.pieces)
        self._bpe = ranks and tiktoken.Encoding(
            "nanobeige", pat_str=spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
            mergeable_ranks=ranks, special_tokens={})
        self._prefix_space = self.pieces[self.encode("a")[0]].startswith(b" ")
        self.bos, self.eot = self._control("document start", BOS), self._control("document end", EOT)
        for control, i in self.special.items():
            if i in self.encode(control):
                raise UserError(f"{name} takes {control!r} written in a text for the control token: not safe to use")

    def _set_pieces(self, spec: dict, added: dict[str, int]) -> None:
        """The bytes of each id: byte-level symbols (GPT), or text with "▁" for space and <0xNN> for a byte (Llama)."""
        decoder, vocab = spec["decoder"] or {}, spec["model"]["vocab"]
        byte_level = "ByteLevel" in {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
        if not byte_level and not spec["model"]["byte_fallback"]:
            raise UserError(f"{self.name} cannot write every byte: take a byte-level or byte-fallback tokenizer")
        self.n_vocab = 1 + max([*vocab.values(), *added.values()])
        self.pieces = [b""] * self.n_vocab
        for piece, i in (vocab | added).items():
            if piece in self.special or byte_level and (piece in added or not set(piece) <= BYTE_OF_SYMBOL.keys()):
                self.pieces[i] = piece.encode()
            elif byte_level:
                self.pieces[i] = bytes(BYTE_OF_SYMBOL[c] for c in piece)
            elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
                self.pieces[i] = bytes.fromhex(byte[1])
            else:
                self.pieces[i] = piece.replace("▁", " ").encode()
        self.byte_lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        self.byte_lengths[list(self.special.values())] = 0

    def _control(self, role: str, names: list[str]) -> int:
        for name in names:
            if name in self.special:
                return self.special[name]
        raise UserError(f"{self.name} has no token for {role}: none of {', '.join(names)}")

    im_start = property(lambda self: self._control("turn start", ["<|im_start|>"]))
    im_end = property(lambda self: self._control("turn end", ["<|im_end|>"]))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without document start or end. Control tokens written in it stay text."""
        if self._bpe:
            return self._bpe.encode_ordinary(text)
        return self._hf.encode(_valid(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of many texts, each (n,) uint32. `threads` counts for tiktoken; `tokenizers` uses RAYON_NUM_THREADS."""
        if not self._bpe:
            batch = self._hf.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in batch]
        encode = partial(self._bpe.encode_to_numpy, disallowed_special=())
        if threads == 1:
            return [encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for (control tokens as their names): `decode_bytes(encode(t)) == t.encode()`.

        Ids past n_vocab stand for nothing: rows of an embedding that is padded to a round size, which can be sampled.
        """
        data = b"".join([self.pieces[i] for i in ids if i < self.n_vocab])
        return data[1:] if self._prefix_space and data.startswith(b" ") else data  # Llama's "▁" before a text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: Path | str) -> None:
        """Writes the tokenizer.json, all or nothing."""
        write_atomic(Path(path), self.json)

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Reads a tokenizer.json. Raises UserError if there is none or it cannot serve."""
        try:
            return Tokenizer(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UserError(f"no tokenizer {path} ({error.strerror}): give a Hugging Face tokenizer.json; where only a "
                            "tokenizer.model is released, transformers' AutoTokenizer can save one") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a tokenizer.json: it is not a text file") from None


def _valid(text: str) -> str:
    """Lone surrogates (broken JSON escapes) as U+FFFD, as tiktoken does; `tokenizers` would refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_control_tokens(spec: dict, special: dict[str, int]) -> tokenizers.Tokenizer:
    """The `tokenizers` back end, deaf to control tokens in a text, and without truncation, padding or templates."""
    # A Llama vocabulary holds "<s>" as an ordinary piece too: no merge may build it.
    merges = [merge for merge in spec["model"]["merges"] if "".join(merge) not in special]
    hf = tokenizers.Tokenizer.from_str(json.dumps(spec | {
        "model": spec["model"] | {"merges": merges}, "post_processor": None, "truncation": None, "padding": None,
        "added_tokens": [token | {"special": token["content"] in special} for token in spec["added_tokens"]]}))
    hf.encode_special_tokens = True
    return hf


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken joins the neighbours whose joined bytes have the lowest rank, `tokenizers` those whose merge is listed first

def _split(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of one piece, the plain way: joins the leftmost pair of lowest rank until none is left."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[i] == len(ranks):
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _ranks(spec: dict, pieces: list[bytes]) -> dict[bytes, int] | None:
    """tiktoken's table bytes -> id, or None where it is not certain to give the same ids as `tokenizers`.

    Certain: a pattern known to mean the same to both regex engines, ids = 256 bytes then merges in order, and every
    merge joins just the two parts into which the earlier merges alone bring its own bytes. For then, whenever two
    neighbours x, y join to a token, no earlier merge crossed their outer ends, so they are that token's own two parts.
    """
    model, cut = spec["model"], spec["pre_tokenizer"]
    known = [json.loads(_untrained(kind).to_str())["pre_tokenizer"] for kind in PATTERNS]
    if cut not in known or spec["normalizer"] or any(model[key] for key in (
            "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")):
        return None
    n = 256 + len(model["merges"])
    if len(model["vocab"]) != n or [t["id"] for t in spec["added_tokens"]] != list(range(n, len(pieces))):
        return None
    ranks = {piece: i for i, piece in enumerate(pieces[:256])}
    for i, merge in enumerate(model["merges"], 256):
        if _split(pieces[i], ranks) != [bytes(BYTE_OF_SYMBOL[c] for c in part) for part in merge]:
            return None
        ranks[pieces[i]] = i
    return ranks


def _untrained(kind: str) -> tokenizers.Tokenizer:
    """Cuts texts by the kind's pattern and writes bytes as symbols; knows no merges yet."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated"),
                                                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return hf


def _up_to(megabytes: float, texts: Iterable[str]) -> Iterator[str]:
    left = int(megabytes * 1e6)
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text.encode("utf-8", "replace"))


def train_tokenizer(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Trains on the first cfg.train_mb megabytes of texts; the same texts give the same file.

    Ids: the 256 bytes, the merges, then SPECIAL_TOKENS. Raises UserError for a wrong setting or when there is no text.
    """
    n_merges = cfg.vocab_size - 256 - len(SPECIAL_TOKENS)
    if cfg.kind not in PATTERNS:
        raise UserError(f"tokenizer.kind is {cfg.kind!r}; it must be one of {', '.join(PATTERNS)}")
    if n_merges < 0:
        raise UserError(f"tokenizer.vocab_size is {cfg.vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} control tokens "
                        f"need at least {256 + len(SPECIAL_TOKENS)}")
    texts = filter(None, texts)
    first = next(texts, None)
    if first is None:
        raise UserError("there is no text to train the tokenizer on: give corpus.path or corpus.pools some")
    hf = _untrained(cfg.kind)
    texts = map(_valid, _up_to(cfg.train_mb, itertools.chain([first], texts)))
    hf.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + n_merges, initial_alphabet=SYMBOLS, show_progress=False,
        min_frequency=2 if cfg.kind == "bpe" else 1))  # a merge seen once is not worth an id, a character is
    merges = [tuple(merge) for merge in json.loads(hf.to_str())["model"]["merges"]]
    vocab = {piece: i for i, piece in enumerate([*SYMBOLS, *("".join(merge) for merge in merges)])}
    hf.model = models.BPE(vocab=vocab, merges=merges)  # the trainer's, but with byte b as id b
    hf.decoder = decoders.ByteLevel()
    hf.add_tokens([AddedToken(name, normalized=False, special=name not in MARKUP) for name in SPECIAL_TOKENS])
    return Tokenizer(hf.to_str(pretty=True))
