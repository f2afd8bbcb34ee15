"""Text to token ids and back: a BPE or a character vocabulary trained here, or a Llama or GPT one.

A tokenizer is one plain file, Hugging Face's tokenizer.json. Two libraries work on it: `tokenizers`
trains and reads every such file; tiktoken encodes faster and on threads, but is used only where its
ids are proven equal (`tiktoken_ranks`). A Llama vocabulary, which tiktoken cannot read, is faster
where a text may be cut into words whose ids are kept (`Words`). Control tokens are put in by id,
never by text: "<|im_end|>" written in a text stays text.
"""
from settings import Bounds, PositiveFloat

import functools
import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

import untrusted
from common import UserError, write_atomic

# Nanbeige4's control tokens. Their ids are our own, and that "<s>" begins and "<|endoftext|>" ends
# each document is our choice. Programs read those of MARKUP in the decoded text.
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *MARKUP]

# Names of the tokens that begin and end a document; the first that a tokenizer has counts.
BOS = ["<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>",
       "<|endoftext|>"]
EOT = ["<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"]

MOST_BYTES = 256 << 20  # of a tokenizer.json
MOST_IDS = 1 << 22      # of a vocabulary; the largest known to us has 262,144
MOST_GAPS = 1 << 16     # ids below the largest that have no token
LONGEST_NAME = 1000     # characters of an added token

# What tries a file out, and what its process may take: a vocabulary of 166,000 ids does with half
# of the memory and 1.2 s.
TRIAL = Path(__file__).with_name("trial.py")
TRIAL_MEMORY = 2 << 30   # bytes of address space
TRIAL_SECONDS = 10       # of CPU time

UNUSED = "<|unused_{}|>"  # holds an id for other programs (`fill_gaps`); it is no token of ours

# How a text is cut before merging. bpe: like GPT-4's, but every digit alone, which arithmetic
# needs. char: every character alone, so that merges only build those of several bytes. Both
# libraries' regex engines read both alike.
PATTERNS = {
    "bpe": r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "char": r"[\s\S]",
}


@dataclass
class TokenizerConfig:
    kind: Literal["bpe", "char"] = "bpe"
    vocab_size: Annotated[int, Bounds(1, 2**24)] = 2048  # ids in all: 256 bytes, merges, 10 control
                                                         # tokens (fewer if the text has fewer)
    train_mb: PositiveFloat = 8.0  # megabytes of text, from all pools alike, that it is trained on
    path: str = ""               # an existing tokenizer.json to use; nothing is trained then. Later
                                 # phases use it, too, where it agrees with their checkpoint's
    eot: str = ""                # the token that ends a document (default: the checkpoint's own, or
                                 # the first that there is of EOT)
    chat_template: Literal["checkpoint", "ours"] = "checkpoint"  # the checkpoint's own, where it
                                 # has one, or ours in any case


def _byte_symbols() -> list[str]:
    """The printable character for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


SYMBOLS = _byte_symbols()
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


class Tokenizer:
    """Made by `train_tokenizer` or `Tokenizer.load`.

    n_vocab: ids are 0 .. n_vocab-1.
    special: name -> id of the control tokens.
    bos, eot: ids that begin and end a document, found by their names, or a checkpoint's own.
    opening: id that begins a text which is to be continued: bos, as in all that we train on, or
        what another's tokenizer puts there; None: nothing.
    eos: further ids that end an answer, of a checkpoint's configs.
    chat_template: a checkpoint's own (data/chat/foreign.py); None: ours, data/chat/template.py.
    im_start, im_end: ids that begin and end a chat turn.
    hash: 16 hex digits over all that decides ids, for shards and checkpoints.
    pieces: the bytes of each id.
    first: id that the file's own post-processor puts before a text, or None; -1 where it has none.
    strips: name of a control token -> whether it takes the blanks (before it, behind it).
    byte_lengths: (n_vocab,) int32, UTF-8 bytes that each token stands for, 0 for control tokens:
        for bits per byte.
    json: the tokenizer.json itself.
    """

    def __init__(self, text: str, name: str = "tokenizer", eot: str = ""):
        """text: a tokenizer.json; name: what errors call it; eot: the name of the token that ends a
        document (default: the first of EOT). UserError where it cannot serve."""
        spec = _parse(text, name)
        self.json, self.name = text, name
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]
                        if token["special"] or token["content"] in SPECIAL_TOKENS}
        self._hash = _hash_json([spec["model"], spec["normalizer"], spec["pre_tokenizer"],
                                 sorted(added.items())])
        self.first = _first_token(spec)
        self.strips = {token["content"]: (token["lstrip"], token["rstrip"])
                       for token in spec["added_tokens"]}
        self._set_pieces(spec, added)
        self._words = self._inside = None
        if cuts_are_safe(spec, self.special):
            self._words = Words(_without_control_tokens(spec | {"normalizer": None}, self.special))
        else:
            self._hf = _without_control_tokens(spec, self.special)
        if (spec["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
            never = spec["pre_tokenizer"] | {"prepend_scheme": "never"}
            self._inside = _without_control_tokens(spec | {"pre_tokenizer": never}, self.special)
        self._bpe = None  # tiktoken's back end
        ranks = tiktoken_ranks(spec, self.pieces)
        if ranks:
            pattern = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            self._bpe = tiktoken.Encoding("nanobeige", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})
        first_id = self.encode("a")[0]
        self._prefix_space = self.pieces[first_id].startswith(b" ")
        self.bos = self._control_token("document start", BOS)
        self.eot = self._control_token("document end", EOT)
        self.eos = ()
        self.opening = self.bos
        self.chat_template = None
        self._by_name = [self.bos, self.eot]
        if eot:
            self.take_eot(eot)
        for control, i in self.special.items():
            if i in self.encode(control):
                raise UserError(f"{name} takes {control!r} written in a text for the control "
                                "token: not safe to use")

    def _set_pieces(self, spec: dict, added: dict[str, int]) -> None:
        """Sets n_vocab, pieces and byte_lengths.

        Pieces are written as byte-level symbols (GPT), or as text with "▁" for a space and <0xNN>
        for a byte (Llama).
        """
        vocab = spec["model"]["vocab"]
        is_byte_level = _is_byte_level(spec)
        if not is_byte_level and not spec["model"]["byte_fallback"]:
            raise UserError(f"{self.name} cannot write every byte: take a byte-level or "
                            "byte-fallback tokenizer")
        self.n_vocab = 1 + max([*vocab.values(), *added.values()])
        self.pieces = [b""] * self.n_vocab
        for piece, i in (vocab | added).items():
            if piece in self.special:
                self.pieces[i] = piece.encode()
            elif not is_byte_level:
                self.pieces[i] = _llama_piece(piece)
            elif piece in added or not set(piece) <= BYTE_OF_SYMBOL.keys():
                self.pieces[i] = piece.encode()
            else:
                self.pieces[i] = bytes(BYTE_OF_SYMBOL[symbol] for symbol in piece)
        self.byte_lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        self.byte_lengths[list(self.special.values())] = 0

    def _control_token(self, role: str, names: list[str]) -> int:
        """The id of the first of these names that is a control token."""
        for name in names:
            if name in self.special:
                return self.special[name]
        raise UserError(f"{self.name} has no token for {role}: none of {', '.join(names)}")

    @property
    def hash(self) -> str:
        """The same for all that give the same ids to the same texts and documents."""
        if [self.bos, self.eot] == self._by_name:
            return self._hash
        return _hash_json([self._hash, self.bos, self.eot])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: the ends of a document, of a turn, and the checkpoint's own."""
        turn_end = self.special.get("<|im_end|>", self.eot)
        return tuple({self.eot, turn_end, *self.eos})

    @property
    def ids(self) -> dict:
        """What a checkpoint keeps beside the file, for `take_ids`."""
        ids = {"bos": self.bos, "eot": self.eot, "eos": list(self.eos)}
        return ids if self.opening == self.bos else ids | {"opening": self.opening}

    def take_ids(self, bos: int | None = None, eot: int | None = None,
                 eos: Iterable[int] = ()) -> None:
        """Takes a checkpoint's own ids in place of those found by name; None leaves what is."""
        self.bos = self.opening = self.bos if bos is None else bos
        self.eot = self.eot if eot is None else eot
        self.eos = tuple(sorted(eos))

    def take_eot(self, name: str) -> None:
        """Ends documents with the control token of this name."""
        self.eot = self._control_token("document end as tokenizer.eot says", [name])

    def disagreement(self, other: "Tokenizer") -> str:
        """Which id of the other means something else here; "" where all that both have agree.

        Then weights that were trained with one of them can go on with the other.
        """
        for i, (ours, theirs) in enumerate(zip(self.pieces, other.pieces)):
            if ours and theirs and ours != theirs:
                return (f"id {i} is {_shown(ours)} in {self.name} and {_shown(theirs)} in "
                        f"{other.name}")
        for name in self.special.keys() & other.special.keys():
            ours, theirs = self.special[name], other.special[name]
            if ours != theirs:
                shown = untrusted.printable(name)
                return f"{shown} is {ours} in {self.name} and {theirs} in {other.name}"
        return ""

    @property
    def im_start(self) -> int:
        return self._control_token("turn start", ["<|im_start|>"])

    @property
    def im_end(self) -> int:
        return self._control_token("turn end", ["<|im_end|>"])

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text, without document start or end. Control tokens written in it stay text.

        begins: whether nothing stands before it: some Llama vocabularies put a blank there alone.
        """
        if self._bpe:
            return self._bpe.encode_ordinary(text)
        if self._words:
            return self._words.encode_batch([text])[0].tolist()
        hf = self._hf if begins or not self._inside else self._inside
        return hf.encode(_without_surrogates(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that is to be continued, at least one."""
        ids = self.encode(text)
        if self.opening is not None:
            return [self.opening, *ids]
        return ids if ids else [self.bos]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of many texts, each (n,) uint32.

        `threads` counts for tiktoken; `tokenizers` uses RAYON_NUM_THREADS.
        """
        if self._words:
            return self._words.encode_batch(texts)
        if not self._bpe:
            texts = [_without_surrogates(text) for text in texts]
            batch = self._hf.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in batch]
        encode = partial(self._bpe.encode_to_numpy, disallowed_special=())
        if threads == 1:
            return [encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for, control tokens as their names.

        `decode_bytes(encode(t)) == t.encode()`. Ids past n_vocab stand for nothing: rows of an
        embedding that is padded to a round size, which can be sampled.
        """
        data = b"".join([self.pieces[i] for i in ids if i < self.n_vocab])
        if self._prefix_space and data.startswith(b" "):  # Llama's "▁" before a text
            return data[1:]
        return data

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: Path | str) -> None:
        """Writes the tokenizer.json, all or nothing."""
        write_atomic(Path(path), self.json)

    @staticmethod
    def load(path: Path | str, eot: str = "") -> "Tokenizer":
        """Reads a tokenizer.json of anyone's. Raises UserError if there is none or it cannot serve.

        eot: the name of the token that ends a document (default: the first of EOT).
        """
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise UserError(f"{path} is no regular file")
            text = untrusted.read_bytes(Path(path), MOST_BYTES).decode()
        except OSError as error:
            raise UserError(f"no tokenizer {path} ({error.strerror}): give a Hugging Face "
                            "tokenizer.json; where only a tokenizer.model is released, "
                            "transformers' AutoTokenizer can save one") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a tokenizer.json: it is not a text file") from None
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if reason := _why_not(text):
            raise UserError(f"{path} is not a tokenizer.json of a Llama- or GPT-type tokenizer: "
                            f"{untrusted.printable(reason)}")
        try:
            return Tokenizer(text, str(path), eot)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a PanicException of Rust is no Exception
            reason = untrusted.printable(repr(error))
            raise UserError(f"{path} cannot serve as a tokenizer: {reason}") from None


def _hash_json(value) -> str:
    """16 hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _shown(piece: bytes) -> str:
    return repr(piece.decode("utf-8", errors="replace"))


@functools.lru_cache(8)  # of what is read again, as each checkpoint has a copy
def _why_not(text: str) -> str:
    """Why a file cannot serve: a process of its own does not survive it, or it is malformed."""
    return untrusted.call_apart(TRIAL, text, TRIAL_MEMORY, TRIAL_SECONDS) or _invalid_ids(text)


def _invalid_ids(text: str) -> str:
    """What is wrong with a file's ids: we number lists by them, as `tokenizers` does. "" for
    nothing."""
    try:
        spec = json.loads(text)
        ids = [*spec["model"]["vocab"].values()]
        ids += [token["id"] for token in spec.get("added_tokens") or []]
        names = [token["content"] for token in spec.get("added_tokens") or []]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return str(error) or type(error).__name__
    if not all(type(i) is int and 0 <= i < MOST_IDS for i in ids):
        return f"its ids must be whole numbers from 0 to {MOST_IDS:,}"
    n_gaps = max(ids, default=0) + 1 - len({*ids})
    if n_gaps > MOST_GAPS:
        return f"{n_gaps:,} of its ids have no token"
    if not all(type(name) is str and len(name) <= LONGEST_NAME for name in names):
        return f"an added token has no name, or one of more than {LONGEST_NAME:,} characters"
    return ""


def _parse(text: str, name: str) -> dict:
    """A tokenizer.json in today's form, every id as the file has it.

    UserError if it is none, its model is no BPE, or `tokenizers` gives a token another id.
    """
    try:
        given = json.loads(text)
        filled = fill_gaps(given)
        if filled is not given:
            text = json.dumps(filled)
        spec = json.loads(tokenizers.Tokenizer.from_str(text).to_str())
        assert spec["model"]["type"] == "BPE"
    except Exception as error:  # tokenizers raises plain Exception
        why = str(error).splitlines()[0] if str(error) else "it is no BPE"
        raise UserError(f"{name} is not a tokenizer.json of a Llama- or GPT-type tokenizer: "
                        f"{why}") from None
    ids = {token["content"]: token["id"] for token in given.get("added_tokens") or []
           if token["content"] != UNUSED.format(token["id"])}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ids]
    for token in spec["added_tokens"]:
        i = ids[token["content"]]
        if token["id"] != i:
            shown = untrusted.printable(token["content"])
            raise UserError(f"{name}: {shown} has the id {i} there, and tokenizers would give it "
                            f"{token['id']}: give the file its vocabulary and added tokens without "
                            "a gap")
    return spec


def fill_gaps(spec: dict) -> dict:
    """A tokenizer.json with control tokens of no meaning for the ids between its added tokens.

    The same one where there is no such gap. `tokenizers` numbers added tokens one after the other,
    and silently gives those behind a gap other ids: <think> of Nanbeige4-3B-Base would be 166100 in
    place of 166103.
    """
    tokens = list(spec.get("added_tokens") or [])
    ids = [token["id"] for token in tokens]
    n_pieces = len(spec["model"]["vocab"])
    missing = set(range(n_pieces, max(ids, default=0))) - {*ids}
    if not missing:
        return spec
    for i in missing:
        tokens.append({"id": i, "content": UNUSED.format(i), "special": True, "normalized": False,
                       "single_word": False, "lstrip": False, "rstrip": False})
    return spec | {"added_tokens": sorted(tokens, key=lambda token: token["id"])}


def _first_token(spec: dict) -> int | None:
    """The id that a file's post-processor puts before a text; None: it puts none; -1: there is no
    post-processor."""
    if not spec["post_processor"]:
        return -1
    for part in [spec["post_processor"], *spec["post_processor"].get("processors", [])]:
        first = part["single"][0] if part.get("single") else {}
        if "SpecialToken" in first:
            return part["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
    return None


def _is_byte_level(spec: dict) -> bool:
    """Whether pieces are written in byte symbols: what the decoder, or a part of it, undoes."""
    decoder = spec["decoder"] or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _llama_piece(piece: str) -> bytes:
    """The bytes of a piece of a Llama vocabulary."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if byte:
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def _without_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates (broken JSON escapes).

    As tiktoken does; `tokenizers` would refuse them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_control_tokens(spec: dict, special: dict[str, int]) -> tokenizers.Tokenizer:
    """The `tokenizers` back end, deaf to control tokens in a text.

    And without truncation, padding or templates.
    """
    # A Llama vocabulary holds "<s>" as an ordinary piece too: no merge may build it.
    merges = [merge for merge in spec["model"]["merges"] if "".join(merge) not in special]
    added_tokens = [token | {"special": token["content"] in special}
                    for token in spec["added_tokens"]]
    plain_spec = spec | {
        "model": spec["model"] | {"merges": merges},
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
    }
    hf = tokenizers.Tokenizer.from_str(json.dumps(fill_gaps(plain_spec)))
    hf.encode_special_tokens = True
    return hf


# --------------------------------------------------------------------------------------------------
# Where the ids of a text are those of its words

# Merges of a Llama vocabulary run through the whole text, with "▁" for a space. But where no merge
# joins two characters, the text may be cut between them: before a "▁", around line breaks, and
# between a letter and a sign or digit.
_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿ\u0370-\u04ff\u3040-\u30ff\u4e00-\u9fff"
_SIGNS = r"!-@\[-`{-~，。、；：？！“”‘’（）《》「」…—"
_NO_OTHER = rf"(?![^{_LETTERS}{_SIGNS}▁\n])"  # accents and the like may join either
WORD = re.compile(rf"▁*+(?:[{_LETTERS}]++{_NO_OTHER}|[{_SIGNS}]++{_NO_OTHER}|[^▁\n]++)|▁++|\n++")
CUT = re.compile(rf"[{_LETTERS}][{_SIGNS}]|[{_SIGNS}][{_LETTERS}]|[^▁]▁|[^\n]\n|\n[^\n]")
LLAMA_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
KEPT_CHARACTERS = 1 << 24  # of the words that are kept, then all are forgotten


def cuts_are_safe(spec: dict, special: dict[str, int]) -> bool:
    """Whether WORD cuts only where no merge joins, so that a text's ids are those of its words."""
    model = spec["model"]
    if spec["normalizer"] != LLAMA_NORMALIZER or spec["pre_tokenizer"]:
        return False
    if model["dropout"] or model["ignore_merges"]:
        return False
    if any(token["content"] not in special for token in spec["added_tokens"]):
        return False  # it would be looked for in the text, across words
    return not any(CUT.search("".join(merge)) for merge in model["merges"])


class Words:
    """Encodes a text word by word, and knows the ids of words that came before."""

    def __init__(self, hf: tokenizers.Tokenizer):
        self._hf = hf  # takes text as LLAMA_NORMALIZER leaves it
        self._known: dict[str, bytes] = {}  # word -> its ids as uint32
        self._n_characters = 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of many texts, each (n,) uint32."""
        if self._n_characters > KEPT_CHARACTERS:
            self._known = {}
            self._n_characters = 0
        known = self._known
        words_of_texts = [_words(text) for text in texts]
        new = list(set().union(*words_of_texts) - known.keys())
        for word, encoding in zip(new, self._hf.encode_batch_fast(new, add_special_tokens=False)):
            known[word] = array("I", encoding.ids).tobytes()
            self._n_characters += len(word)
        ids = [b"".join(map(known.__getitem__, words)) for words in words_of_texts]
        return [np.frombuffer(data, np.uint32) for data in ids]


def _words(text: str) -> list[str]:
    """A text as LLAMA_NORMALIZER has it, in words."""
    if not text:
        return []
    return WORD.findall("▁" + _without_surrogates(text).replace(" ", "▁"))


# --------------------------------------------------------------------------------------------------
# Where both back ends give the same ids: tiktoken joins the neighbours whose joined bytes have the
# lowest rank, `tokenizers` those whose merge is listed first

# Settings of a BPE that tiktoken does not know.
MOST_STEPS = 10 ** 8  # of the proof, n² for a piece of n bytes: ten times those of Nanbeige4's
UNKNOWN_TO_TIKTOKEN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                       "byte_fallback", "ignore_merges")


def tiktoken_ranks(spec: dict, pieces: list[bytes]) -> dict[bytes, int] | None:
    """tiktoken's table bytes -> id; None where it might give other ids than `tokenizers`.

    Certain: a pattern known to mean the same to both regex engines, ids = 256 bytes then merges in
    order, and every merge joins just the two parts into which the earlier merges alone bring its
    own bytes. For then, whenever two neighbours x, y join to a token, no earlier merge crossed
    their outer ends, so they are that token's own two parts.
    """
    model = spec["model"]
    known = [json.loads(_untrained(kind).to_str())["pre_tokenizer"] for kind in PATTERNS]
    if spec["pre_tokenizer"] not in known or spec["normalizer"]:
        return None
    if any(model[setting] for setting in UNKNOWN_TO_TIKTOKEN):
        return None
    if sum(len(piece) ** 2 for piece in pieces) > MOST_STEPS:
        return None
    n = 256 + len(model["merges"])
    added_ids = [token["id"] for token in spec["added_tokens"]]
    if len(model["vocab"]) != n or added_ids != list(range(n, len(pieces))):
        return None
    ranks = {piece: i for i, piece in enumerate(pieces[:256])}
    for i, merge in enumerate(model["merges"], 256):
        left, right = (_symbols_to_bytes(part) for part in merge)
        if _split_by_merges(pieces[i], ranks) != [left, right]:
            return None
        ranks[pieces[i]] = i
    return ranks


def _symbols_to_bytes(piece: str) -> bytes:
    return bytes(BYTE_OF_SYMBOL[symbol] for symbol in piece)


def _split_by_merges(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding of one piece, the plain way.

    Joins the leftmost pair of lowest rank until none is left.
    """
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        lowest = min(pairs)
        if lowest == len(ranks):
            break
        i = pairs.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# --------------------------------------------------------------------------------------------------
# Training

def _untrained(kind: str) -> tokenizers.Tokenizer:
    """Cuts texts by the kind's pattern and writes bytes as symbols; knows no merges yet."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return hf


def _up_to(megabytes: float, texts: Iterable[str]) -> Iterator[str]:
    """The first megabytes of texts, the last text cut."""
    left = int(megabytes * 1e6)
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text.encode("utf-8", "replace"))


def train_tokenizer(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Trains on the first cfg.train_mb megabytes of texts; the same texts give the same file.

    Ids: the 256 bytes, the merges, then SPECIAL_TOKENS. Raises UserError for a wrong setting or
    when there is no text.
    """
    if cfg.kind not in PATTERNS:
        raise UserError(f"tokenizer.kind is {cfg.kind!r}; it must be one of "
                        f"{', '.join(PATTERNS)}")
    n_symbols = cfg.vocab_size - len(SPECIAL_TOKENS)  # bytes and merges
    if n_symbols < 256:
        raise UserError(f"tokenizer.vocab_size is {cfg.vocab_size}; 256 bytes and "
                        f"{len(SPECIAL_TOKENS)} control tokens need at least "
                        f"{256 + len(SPECIAL_TOKENS)}")
    texts = filter(None, texts)
    first = next(texts, None)
    if first is None:
        raise UserError("there is no text to train the tokenizer on: give corpus.path or "
                        "corpus.pools some")
    texts = _up_to(cfg.train_mb, itertools.chain([first], texts))
    trainer = trainers.BpeTrainer(
        vocab_size=n_symbols,
        initial_alphabet=SYMBOLS,
        show_progress=False,
        # a merge seen once is not worth an id, a character is
        min_frequency=2 if cfg.kind == "bpe" else 1)
    hf = _untrained(cfg.kind)
    hf.train_from_iterator(map(_without_surrogates, texts), trainer)

    merges = [tuple(merge) for merge in json.loads(hf.to_str())["model"]["merges"]]
    joined = ["".join(merge) for merge in merges]
    vocab = {piece: i for i, piece in enumerate(SYMBOLS + joined)}
    hf.model = models.BPE(vocab=vocab, merges=merges)  # the trainer's, but with byte b as id b
    hf.decoder = decoders.ByteLevel()
    hf.add_tokens([AddedToken(name, normalized=False, special=name not in MARKUP)
                   for name in SPECIAL_TOKENS])
    return Tokenizer(hf.to_str(pretty=True), eot=cfg.eot)
