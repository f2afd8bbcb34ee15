"""Oracles: the text itself (round trip), `tokenizers`, and transformers reading the same file."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from common import UserError
from data.text import tokenizer as T
from data.text.tokenizer import MARKUP, SPECIAL_TOKENS, Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = [
    __doc__,
    open(T.__file__, encoding="utf-8").read(),
    open(__file__, encoding="utf-8").read(),
    (
        "naïve café, Grüße, Привет, мир! 你好，世界。こんにちは 안녕 🙂👩‍👩‍👧‍👦 "
        "12345 + 67890 = 80235\r\n"
    )
    * 3,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=900))


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerConfig(kind="char", vocab_size=900))


def fuzz(n: int) -> list[str]:
    """Texts of words, code points from everywhere, spaces of all kinds, digits, control tokens
    whole and broken."""
    draw = random.Random(0)
    anywhere = lambda: chr(
        draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000), draw.randrange(592)])
    )
    makers = [
        lambda: "".join(anywhere() for _ in range(draw.randrange(12))),
        lambda: draw.choice(" \t\n\r\u00a0\u2028\u3000\x85\x1c") * draw.randrange(1, 9),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 20))),
        lambda: (
            draw.choice(SPECIAL_TOKENS) if draw.random() < 0.7 else draw.choice(SPECIAL_TOKENS)[:-1]
        ),
        lambda: draw.choice(
            [
                "the tokenizer",
                "don't WE'LL",
                " def f(x):\n    return",
                "你好世界",
                "🙂👩‍👩‍👧‍👦",
                "é",
                "١٢٣",
                "½",
                "aaaaaaa",
                "-----",
                "\0",
            ]
        ),
        lambda: draw.choice(TEXTS)[draw.randrange(300) :][: draw.randrange(60)],
    ]
    return ["", " ", "\n"] + [
        "".join(draw.choice(makers)() for _ in range(draw.randrange(1, 9))) for _ in range(n)
    ]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_round_trip_and_both_back_ends_agree(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer._bpe is not None, "our own file must take tiktoken's way"
    texts = fuzz(600)
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=2), strict=True):
        assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.decode(ids) == text
        assert (
            list(ids)
            == tokenizer.encode(text)
            == tokenizer._hf.encode(text, add_special_tokens=False).ids
        )
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert not set(ids) & set(tokenizer.special.values()), "a control token came from text"


def test_every_byte_and_every_code_point(bpe, char):
    for tokenizer in (bpe, char):
        assert [tokenizer.decode_bytes([i]) for i in range(256)] == [bytes([b]) for b in range(256)]
        everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
        assert tokenizer.decode(tokenizer.encode(everything)) == everything
        assert (
            tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        )  # a lone surrogate is no text


def test_digits_alone_and_words_whole(bpe, char):
    assert bpe.encode("1234567") == [ord(c) for c in "1234567"]
    assert len(bpe.encode(" tokenizer")) == 1
    text = "naïve café 你好 🙂"
    assert len(char.encode(text)) == len(text), "each character that was seen is one token"


def test_transformers_reads_the_same_file(bpe, char, tmp_path):
    for tokenizer in (bpe, char):
        tokenizer.save(tmp_path / "tokenizer.json")
        hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert len(hf) == tokenizer.n_vocab
        assert hf.convert_tokens_to_ids(SPECIAL_TOKENS) == list(tokenizer.special.values())
        for text in fuzz(300):
            for name in MARKUP:  # transformers has no way to keep these as text
                text = text.replace(name, name[:-1])
            assert hf.encode(
                text, add_special_tokens=False, split_special_tokens=True
            ) == tokenizer.encode(text)
        ids = [tokenizer.bos, *tokenizer.encode("Grüße 12"), tokenizer.im_end, tokenizer.eot]
        assert hf.decode(ids) == tokenizer.decode(ids) == "<s>Grüße 12<|im_end|><|endoftext|>"
        assert hf.encode("<s>Grüße 12<|im_end|><|endoftext|>", add_special_tokens=False) == ids


def test_save_load_and_hash(bpe, char, tmp_path):
    bpe.save(tmp_path / "a.json")
    again = Tokenizer.load(tmp_path / "a.json")
    assert (again.hash, again.json, again.special) == (bpe.hash, bpe.json, bpe.special) and len(
        bpe.hash
    ) == 16
    compact = Tokenizer(json.dumps(json.loads(bpe.json) | {"truncation": None}))
    assert compact.hash == bpe.hash, "layout of the file is not its meaning"
    assert (
        len({bpe.hash, char.hash, train_tokenizer(TEXTS, TokenizerConfig(vocab_size=899)).hash})
        == 3
    )


def test_training_is_deterministic_over_processes():
    script = (
        "import sys, data.text.test_tokenizer as t; sys.stdout.write("
        "t.train_tokenizer(t.TEXTS, t.TokenizerConfig(vocab_size=700)).hash)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert other == train_tokenizer(TEXTS, TokenizerConfig(vocab_size=700)).hash


def test_runs_of_few_letters_stay_exact():
    """Overlapping merges ("aaa", "abab") are where the two libraries' rules would part first."""
    draw = random.Random(1)
    words = [" ".join("".join(draw.choices("ab", k=draw.randrange(1, 12))) for _ in range(4000))]
    tokenizer = train_tokenizer(words, TokenizerConfig(vocab_size=700))
    assert tokenizer._bpe is not None
    for _ in range(500):
        text = "".join(draw.choices("ab", k=draw.randrange(1, 40)))
        assert tokenizer.encode(text) == tokenizer._hf.encode(text).ids


def test_tiktoken_only_where_exact(bpe):
    spec = json.loads(bpe.json)
    merges = spec["model"]["merges"]
    swapped = [merges[0], merges[2], merges[1], *merges[3:]]
    for change in (
        {"model": spec["model"] | {"merges": swapped}},
        {"normalizer": {"type": "NFC"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "use_regex": True,
                "trim_offsets": True,
            }
        },
    ):
        other = Tokenizer(json.dumps(spec | change))
        assert other._bpe is None and other.hash != bpe.hash
        hf = tokenizers.Tokenizer.from_str(json.dumps(spec | change))
        for text in ["def the tokenizer(text): 12", "Grüße <s"]:
            assert other.encode(text) == hf.encode(text).ids


def llama_like(prefix: str = "▁", words: str = r"▁*[^▁]+|▁+") -> tokenizers.Tokenizer:
    """A SentencePiece-like BPE with byte fallback, as Llama 2 and Nanbeige4 ship it; "<s>" is even
    a merge here."""
    hf = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend(prefix)] if prefix else []
    hf.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    hf.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")  # the trainer needs words
    names = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    hf.train_from_iterator(
        [t + " <s></s>" * 99 for t in TEXTS[:3]],
        trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False),
    )
    spec = json.loads(hf.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < 3]
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    vocab.setdefault("<s", len(vocab))
    spec["model"]["merges"] = [["<", "s"], ["<s", ">"], *[m for m in merges if m != ["<", "s"]]]
    hf = tokenizers.Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": None}))
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf.add_tokens([AddedToken("<think>", normalized=False, special=False)])  # Nanbeige4 marks it so
    hf.enable_truncation(8)
    hf.enable_padding(length=20)
    return hf


@pytest.mark.parametrize("prefix", ["▁", ""])
def test_foreign_byte_fallback_file(tmp_path, prefix):
    hf = llama_like(prefix)
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer._bpe is None and tokenizer.bos == 1 and tokenizer.eot == 2
    assert tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2, "<think>": tokenizer.n_vocab - 1}
    hf.no_truncation(), hf.no_padding()
    texts = [text.replace("▁", "_") for text in fuzz(400)]
    for text, batch in zip(texts, tokenizer.encode_batch(texts, 2), strict=True):
        ids = tokenizer.encode(text)
        assert list(batch) == ids and not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode_bytes(ids) == text.encode()
        if not any(name in text for name in tokenizer.special):
            assert ids == hf.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == hf.decode(ids)
    assert tokenizer.decode([1, *tokenizer.encode("hi")]) == ("<s> hi" if prefix else "<s>hi")


def test_words_have_the_ids_of_the_whole_text(monkeypatch):
    """Where no merge joins what is cut; also when the words that are kept are forgotten."""
    spec = json.loads(llama_like(words=T.WORD.pattern).to_str())
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    del spec["model"]["merges"][:2]  # "<s>"
    whole = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer = Tokenizer(json.dumps(spec))
    monkeypatch.setattr(T, "KEPT_CHARACTERS", 500)
    texts = ["e\u0301a\u0308.b", "a\u2460\u3002b", "a ▁ b▁", "\n\n a\n", "你好，世界。a。b"]
    texts += [*fuzz(400), *TEXTS]
    texts = [text for text in texts if not any(name in text for name in tokenizer.special)]
    assert tokenizer._words
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text) == whole.encode(text).ids
        assert tokenizer.decode_bytes(ids) == text.replace("▁", " ").encode()
    for merge in (["e", "▁"], ["e", "."], ["\n", "e"]):
        joined = json.loads(json.dumps(spec))
        joined["model"]["merges"].append(merge)
        joined["model"]["vocab"].setdefault("".join(merge), len(joined["model"]["vocab"]))
        for piece in merge:
            joined["model"]["vocab"].setdefault(piece, len(joined["model"]["vocab"]))
        assert not T.cuts_are_safe(joined, tokenizer.special)


CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]


def released_like(kind: str = "chat", **changes) -> str:
    """A tokenizer.json like those that Nanbeige released: for chats, or "base".

    The two have the same pieces. Base has no chat tokens, and a gap in their place; <think> of the
    other is found after normalizing alone.
    """
    spec = json.loads(llama_like().to_str())
    spec["truncation"] = spec["padding"] = None
    n = len(spec["model"]["vocab"])
    spec["added_tokens"] = spec["added_tokens"][:3]
    for i, name in enumerate(CHAT, n):
        is_markup = name in MARKUP
        if kind == "chat" or is_markup:
            token = AddedToken(name, normalized=is_markup and kind == "chat", special=True)
            fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            spec["added_tokens"].append({"id": i} | {key: getattr(token, key) for key in fields})
    return json.dumps(spec | changes)


def test_ids_behind_a_gap_stay():
    """As in the file; `tokenizers` by itself moves them."""
    base, chat = Tokenizer(released_like("base"), "base"), Tokenizer(released_like(), "chat")
    n = chat.special["<|im_start|>"]
    moved = tokenizers.Tokenizer.from_str(released_like("base")).token_to_id("<think>")
    assert (moved, base.special["<think>"], base.special["</think>"]) == (n, n + 3, n + 4)
    assert base.n_vocab == chat.n_vocab == n + 5 and not base.pieces[n] and base.pieces[n + 3]
    assert list(base.special) == ["<unk>", "<s>", "</s>", "<think>", "</think>"]
    assert base.decode([n, n + 3]) == "<think>"
    for text in [*fuzz(100), "\n<think>\n", f"<|unused_{n}|>"]:
        ids = base.encode(text)
        assert ids == chat.encode(text) and max(ids, default=0) < n


def test_an_ordinary_added_token_behind_a_gap_is_found_in_a_text():
    spec = json.loads(released_like("base"))
    word = spec["added_tokens"][-1] | {"content": "nanobeige", "special": False}
    word["id"] += 7
    tokenizer = Tokenizer(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], word]}))
    assert tokenizer.encode("a nanobeige b").count(word["id"]) == 1
    assert tokenizer.decode([word["id"]]) == "nanobeige"


def test_an_id_that_cannot_stay_is_an_error():
    """A token that is a piece, too, has the piece's id, whatever the list says."""
    spec = json.loads(released_like("base"))
    spec["added_tokens"][-1]["content"] = "<0x41>"
    with pytest.raises(UserError, match="t.json: <0x41> has the id [0-9]+ there, and .* it 68"):
        Tokenizer(json.dumps(spec), "t.json")


def test_agreement_of_two_tokenizers(bpe):
    base, chat = Tokenizer(released_like("base"), "base"), Tokenizer(released_like(), "chat")
    assert base.hash != chat.hash
    assert base.disagreement(chat) == chat.disagreement(base) == bpe.disagreement(bpe) == ""
    n = chat.special["<|im_start|>"]
    spec = json.loads(released_like())
    spec["added_tokens"][3]["content"] = "<|start|>"
    other = Tokenizer(json.dumps(spec), "other")
    assert chat.disagreement(other) == f"id {n} is '<|im_start|>' in chat and '<|start|>' in other"
    spec = json.loads(released_like())
    spec["added_tokens"][3]["id"] = n + 9
    assert f"<|im_start|> is {n} in chat and {n + 9} in o" in chat.disagreement(
        Tokenizer(json.dumps(spec), "o")
    )
    shorter = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=899))
    assert "is" in bpe.disagreement(shorter) and "is" in chat.disagreement(bpe)


def test_ends_of_documents(bpe, tmp_path):
    """By name, or as the setting or a checkpoint say; another end is another hash."""
    chat = Tokenizer(released_like())
    assert chat.ids == {"bos": 1, "eot": chat.special["<|endoftext|>"], "eos": []}
    (tmp_path / "t.json").write_text(released_like())
    given = Tokenizer(released_like(), eot="</s>")
    for other in (given, Tokenizer.load(tmp_path / "t.json", "</s>")):
        assert other.ids == {"bos": 1, "eot": 2, "eos": []} and other.hash != chat.hash
    again = Tokenizer(released_like())
    again.take_ids(**other.ids)
    assert again.hash == other.hash
    again.take_ids(**chat.ids)
    assert again.hash == chat.hash
    again.take_ids(eos=[9, 7])
    assert again.ids == chat.ids | {"eos": [7, 9]} and again.hash == chat.hash
    with pytest.raises(UserError, match="document end as tokenizer.eot says: none of <end>"):
        Tokenizer(released_like(), eot="<end>")
    trained = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=900, eot="</s>"))
    assert trained.eot == trained.special["</s>"] and trained.json == bpe.json


def test_user_errors(tmp_path, bpe):
    def error(text: str) -> str:
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError) as caught:
            Tokenizer.load(tmp_path / "t.json")
        assert "\n" not in str(caught.value) and "t.json" in str(caught.value)
        return str(caught.value)

    assert "not a tokenizer.json" in error("hello") and "not a tokenizer.json" in error('{"a": 1}')
    assert "not a tokenizer.json" in error(
        tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str()
    )
    assert "document start" in error(json.dumps(json.loads(bpe.json) | {"added_tokens": []}))
    with pytest.raises(UserError, match="no tokenizer .*none.json"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="turn start"):
        llama_like().save(str(tmp_path / "l.json")), Tokenizer.load(tmp_path / "l.json").im_start
    for texts, cfg, message in [
        ([], {}, "no text"),
        (["", ""], {}, "no text"),
        (["a"], {"kind": "word"}, "bpe, char"),
        (["a"], {"vocab_size": 265}, "at least 266"),
    ]:
        with pytest.raises(UserError, match=message):
            train_tokenizer(texts, TokenizerConfig(**cfg))
    assert train_tokenizer(["a"], TokenizerConfig()).n_vocab == 266
