"""Pairs from hand-made samples and from files, their order, and packed rows beside single
sequences."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import loop
from common import UserError
from data.chat import template
from data.chat.packing import pack, share_prefixes
from data.chat.pairs import (
    CHOSEN,
    REJECTED,
    Pair,
    choose_negative,
    choose_positive,
    make_record,
    read_pairs,
    to_sequences,
)
from data.tasks import registry
from data.tasks.problem import to_chat
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from model import ModelConfig, Transformer, init_weights

ASK = [{"role": "user", "content": "Name a color."}]
RIGHT, WRONG = "<think>\nSky, sea.\n</think>\n\nBlue.", "Loud."


# ---- which samples make a pair


def sample(text="Answer: 3", score=1.0, logprob=-1.0, finish="stop") -> dict:
    return {
        "text": text,
        "tokens": [1, 2],
        "finish_reason": finish,
        "score": score,
        "logprob": logprob,
    }


UNUSABLE = {
    "cut off": sample(finish="length", logprob=-0.1),
    "empty": sample(" \n", logprob=-0.1),
    "unscored": sample(score=None, logprob=-0.1),
}


@pytest.mark.parametrize(
    "better",
    [
        *UNUSABLE.values(),
        sample(score=0.0, logprob=-0.1),
        sample(score=0.9, logprob=-0.1),
        sample("<think>\nThen Answer: 3", logprob=-0.1),
        sample("<think>\nSo 3.\n</think>", logprob=-0.1),
    ],
)
def test_positive_is_whole_right_and_thought_to_its_end(better):
    """However likely a sample is, it is passed over for a usable one, and alone gives none."""
    good = sample()
    assert (
        choose_positive([better, good], 1.0) is good
        and choose_positive([better], 1.0) is None
        and choose_positive([], 1.0) is None
    )


def test_positive_is_the_likeliest_right_sample_and_the_first_of_equals():
    samples = [
        sample(logprob=-2.0),
        sample("<think>\nSo.\n</think>\n\nAnswer: 3", logprob=-0.5),
        sample(logprob=-0.5),
    ]
    assert choose_positive(samples, 1.0) is samples[1]
    assert choose_positive(samples[::-1], 1.0) is samples[2]
    half = sample(score=0.5, logprob=-0.1)
    assert choose_positive([half, *samples], 0.5) is half and choose_positive([half], 0.6) is None


@pytest.mark.parametrize("likelier", [s | {"score": s["score"] and 0.0} for s in UNUSABLE.values()])
def test_negative_is_whole_and_scored(likelier):
    wrong = sample(score=0.0)
    assert (
        choose_negative([likelier, wrong, sample()], 0.5) is wrong
        and choose_negative([likelier, sample()], 0.5) is None
    )


def test_negative_is_bad_enough_and_the_likeliest_of_these():
    right, half, wrong = (
        sample(logprob=-0.1),
        sample(score=0.5, logprob=-1.0),
        sample(score=0.0, logprob=-2.0),
    )
    assert choose_negative([right, half, wrong], 0.5) is half
    assert choose_negative([right, half, wrong], 0.4) is wrong
    assert choose_negative([right, half], 0.4) is None and choose_negative([], 0.5) is None
    unclosed = sample("<think>\nOn and on", score=0.0, logprob=-1.0)
    assert (
        choose_negative([unclosed, half], 0.5) is unclosed
    )  # equally likely: the first; a bad end may be learned from


# ---- the file


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        message["content"]
        for problem in registry.family("math").problems("train", 50, 1)
        for message in to_chat(problem)
    ]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=340))


def write(folder, *records):
    """A file of pairs: records are lines as they are, or become JSON."""
    path = folder / "pairs.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def rendered(messages, tokenizer) -> list[int]:
    """What SFT trains on, up to and with the last <|im_end|>."""
    ids = template.render(messages, tokenizer)
    while ids[-1] != tokenizer.special["<|im_end|>"]:
        ids.pop()
    return ids


SAID = {  # the forms of a response, and the assistant's message that each of them means
    "text": ("Blue.", {"content": "Blue."}),
    "text with thoughts": (RIGHT, {"content": "Blue.", "reasoning": "Sky, sea."}),
    "text in a dict": (
        {"text": RIGHT, "score": 1.0},
        {"content": "Blue.", "reasoning": "Sky, sea."},
    ),
    "messages": (
        [*ASK, {"role": "assistant", "content": RIGHT}],
        {"content": "Blue.", "reasoning": "Sky, sea."},
    ),
    "messages of the answer alone": (
        [{"role": "assistant", "content": "Blue."}],
        {"content": "Blue."},
    ),
    "messages with reasoning": (
        [*ASK, {"role": "assistant", "content": "Blue.", "reasoning": "Sky, sea."}],
        {"content": "Blue.", "reasoning": "Sky, sea."},
    ),
    "leading space": ("  Blue.", {"content": "  Blue."}),
}


@pytest.mark.parametrize("form", SAID)
@pytest.mark.parametrize(
    "prompt",
    [
        ASK[0]["content"],
        [
            {"role": "system", "content": "Be brief."},
            *ASK,
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Another?"},
        ],
    ],
    ids=["question", "messages"],
)
def test_prompt_and_response_are_the_tokens_of_the_chat_form(tokenizer, tmp_path, form, prompt):
    """On both sides; the end of the turn belongs to the response."""
    response_form, message = SAID[form]
    path = write(
        tmp_path,
        {"prompt": prompt, "chosen": response_form, "rejected": WRONG, "task": "colors"},
        {"prompt": prompt, "chosen": WRONG, "rejected": response_form, "number": 7},
    )
    (a, b), left_out = read_pairs(path, tokenizer, 512, "stop")
    messages = ASK if isinstance(prompt, str) else prompt
    wanted, other = (
        rendered([*messages, {"role": "assistant"} | m], tokenizer)
        for m in (message, {"content": WRONG})
    )
    assert a.prompt + a.chosen == b.prompt + b.rejected == wanted and not left_out
    assert a.prompt + a.rejected == b.prompt + b.chosen == other
    assert a.prompt == template.render(messages, tokenizer, add_generation_prompt=True)
    assert (a.number, a.task, b.number, b.task) == (0, "colors", 7, "")


def test_the_teachers_prompt_has_its_system_turn(tokenizer, tmp_path):
    path = write(tmp_path, GOOD)
    (pair,), _ = read_pairs(path, tokenizer, 512, "stop", "Be brief.")
    asked = [{"role": "user", "content": "Name a color."}]
    assert pair.prompt == template.render(asked, tokenizer, True)
    system = [{"role": "system", "content": "Be brief."}]
    assert pair.teacher_prompt == template.render(system + asked, tokenizer, True)
    longest = len(pair.teacher_prompt) + max(len(pair.chosen), len(pair.rejected))
    assert len(read_pairs(path, tokenizer, longest, "stop", "Be brief.")[0]) == 1
    assert len(read_pairs(path, tokenizer, longest - 1, "stop", "Be brief.")[0]) == 0
    assert read_pairs(path, tokenizer, 512)[0][0].teacher_prompt is None


def test_tokens_are_taken_as_they_were_sampled(tokenizer, tmp_path):
    """Not decoded and encoded again, which would merge them; nor is the end of the turn added."""
    spelled = [tokenizer.encode(letter)[0] for letter in "Mia has"]
    assert tokenizer.encode("Mia has") != spelled and tokenizer.decode(spelled) == "Mia has"
    sides = [
        sample(score=score) | {"tokens": tokens}
        for score, tokens in ((1.0, spelled), (0.0, spelled[:3]))
    ]
    record = make_record(5, "math", "Who?", *sides, ("teacher", "student"))
    assert [record[side]["writer"] for side in ("chosen", "rejected")] == ["teacher", "student"]
    (pair,), _ = read_pairs(write(tmp_path, record), tokenizer, 512, "stop")
    assert (
        pair.chosen == spelled
        and pair.rejected == spelled[:3]
        and (pair.number, pair.task) == (5, "math")
    )


GOOD = {"prompt": "Name a color.", "chosen": RIGHT, "rejected": WRONG}
BAD = {  # a line that is no pair, and what is said of it
    "cut": (json.dumps(GOOD)[:40], "the line is cut or no JSON"),
    "no JSON": ("prompt: hello", "the line is cut or no JSON"),
    "no object": ('"prompt"', "the line is no JSON object"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
    "no rejected": ({"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
    "no text": (GOOD | {"chosen": {"score": 1}}, "'text' is missing"),
    "empty": (
        GOOD | {"rejected": " \n"},
        "rejected is empty: it needs at least one token after the prompt",
    ),
    "empty text": (GOOD | {"chosen": {"text": "", "tokens": []}}, "chosen is empty"),
    "null": (GOOD | {"chosen": None}, "chosen"),
    "no messages": (GOOD | {"chosen": []}, "chosen"),
    "the prompt alone": (GOOD | {"chosen": ASK}, "chosen"),
    "the same": (GOOD | {"rejected": RIGHT}, "chosen and rejected are the same"),
    "other ids": (
        GOOD | {"chosen": {"text": "a", "tokens": [1, 340_000]}},
        "chosen has tokens that this tokenizer",
    ),
    "negative id": (
        GOOD | {"rejected": {"text": "a", "tokens": [-1]}},
        "rejected has tokens that this tokenizer",
    ),
    "role": (
        GOOD | {"prompt": [{"role": "wizard", "content": "Hi."}]},
        "message 0 has the unknown role 'wizard'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_line_that_is_no_pair_is_named(tokenizer, tmp_path, capsys, kind):
    """By file and line: it is left out and counted, or ends the run."""
    line, message = BAD[kind]
    path = write(tmp_path, GOOD, line, GOOD)
    pairs, left_out = read_pairs(path, tokenizer, 512)
    out = capsys.readouterr().out
    assert len(pairs) == 2 and left_out == {"no pair": 1} and out.count("\n") == 1
    assert (
        out.startswith(f"warning: {path}:2: ") and message in out and out.endswith("; left out\n")
    )
    with pytest.raises(UserError) as stopped:
        read_pairs(path, tokenizer, 512, "stop")
    assert str(stopped.value).startswith(f"{path}:2: ") and message in str(stopped.value)


def test_a_file_cut_in_its_last_line(tokenizer, tmp_path, capsys):
    path = write(tmp_path, GOOD, GOOD, GOOD)
    path.write_text(path.read_text()[:-20])
    pairs, left_out = read_pairs(path, tokenizer, 512)
    assert (
        len(pairs) == 2
        and left_out == {"no pair": 1}
        and f"{path}:3: the line is cut" in capsys.readouterr().out
    )


def test_line_separators_within_a_text_are_no_new_line(tokenizer, tmp_path):
    """U+2028 and U+0085 stand as they are in JSON that keeps its Unicode."""
    path = write(tmp_path, json.dumps(GOOD | {"rejected": "Lo\u2028u\x85d."}, ensure_ascii=False))
    (pair,), left_out = read_pairs(path, tokenizer, 512)
    assert tokenizer.decode(pair.rejected) == "Lo\u2028u\x85d.<|im_end|>" and not left_out


def test_a_response_whose_beginning_belongs_to_the_prompt(tmp_path):
    """Blanks and a line break are one token with the prompt's last: then no token is where the
    response begins."""
    merging = train_tokenizer(["\n \n Loud."] * 99, TokenizerConfig(vocab_size=300))
    assert len(merging.encode("\n \n")) == 1
    with pytest.raises(UserError, match="pairs.jsonl:1: rejected begins with"):
        read_pairs(write(tmp_path, GOOD | {"rejected": " \n Loud."}), merging, 512, "stop")


def test_empty_lines_are_no_lines(tokenizer, tmp_path, capsys):
    pairs, left_out = read_pairs(write(tmp_path, GOOD, "", GOOD, "", ""), tokenizer, 512, "stop")
    assert len(pairs) == 2 and not left_out and not capsys.readouterr().out


def test_no_file(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot read the pairs in .*none.jsonl"):
        read_pairs(tmp_path / "none.jsonl", tokenizer, 512)


def test_over_long_pairs_are_counted(tokenizer, tmp_path):
    """The longer side decides; what fills a row to its last token is taken."""
    path = write(tmp_path, GOOD, GOOD | {"chosen": "Blue.", "rejected": WRONG * 30})
    (short, long), _ = read_pairs(path, tokenizer, 512)
    most = len(short.prompt) + len(short.chosen)
    assert len(short.chosen) > len(short.rejected) and most < len(long.prompt) + len(long.rejected)
    assert read_pairs(path, tokenizer, most) == ([short], {f"longer than {most} tokens": 1})
    assert read_pairs(path, tokenizer, most - 1) == ([], {f"longer than {most - 1} tokens": 2})


# ---- the order of pairs


@pytest.mark.parametrize("n", [1, 5, 32])
def test_order_is_a_permutation_an_epoch_and_a_pure_function(n):
    stream = loop.shuffled_indices(n, 0, 7 * n, seed=3)
    epochs = stream.reshape(7, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert (
        n < 32
        or len({tuple(epoch) for epoch in epochs}) == 7
        and (loop.shuffled_indices(n, 0, n, seed=4) != epochs[0]).any()
    )
    for first, count in [(0, 1), (n - 1, 2), (n, n), (2 * n + 1, 3 * n), (6 * n, n)]:
        assert (
            loop.shuffled_indices(n, first, count, seed=3).tolist()
            == stream[first : first + count].tolist()
        )


# ---- packed rows


def made_up(n: int, context: int, seed: int = 0) -> list[Pair]:
    """Random tokens, none of them 0; lengths are lognormal about an eighth of the context, up to
    all of it, and one."""
    rng = np.random.default_rng(seed)
    draw = lambda length: rng.integers(1, 300, length).tolist()
    lengths = (
        np.exp(rng.normal(np.log(context / 16), 0.8, (n, 3)))
        .clip(1, [context // 2] * 3)
        .astype(int)
    )
    lengths[0], lengths[-1] = (1, 1, 1), (context // 2, context - context // 2, 1)
    return [Pair(i, "", *(draw(length) for length in each)) for i, each in enumerate(lengths)]


def test_every_response_token_is_predicted_once_from_the_one_before_it():
    """Sequences are read back from rows and doc_start alone."""
    context, pairs = 64, made_up(50, 64)
    rows = pack(to_sequences(pairs), context)
    flat, starts = rows.tokens.ravel(), rows.doc_start.ravel()
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    assert rows.targets.tolist() == [t for response in responses for t in response]
    assert rows.sequence.tolist() == [i for i, response in enumerate(responses) for _ in response]
    assert len(set(rows.positions.tolist())) == len(rows.positions)
    assert (flat[rows.positions + 1] == rows.targets).all()
    assert (
        starts[rows.positions + 1] == starts[rows.positions]
    ).all()  # and it is of the same sequence
    for i, response in enumerate(responses):
        last = (
            rows.positions[rows.sequence == i][-1] + 1
        )  # … which begins with the prompt and ends with the response
        begin = last // context * context + starts[last]
        prompt = pairs[i // 2].prompt
        assert flat[begin : last + 1].tolist() == prompt + response
        assert (starts[begin : last + 1] == starts[last]).all() and i % 2 in (CHOSEN, REJECTED)
    padding = flat == 0
    assert (~padding).sum() == sum(
        len(pairs[i // 2].prompt) + len(r) for i, r in enumerate(responses)
    )
    assert (starts == np.tile(np.arange(context), len(rows.tokens)))[padding].all()


def test_rows_are_filled():
    rows = pack(to_sequences(made_up(256, 1024)), 1024)
    assert (rows.tokens != 0).mean() > 0.97


@pytest.mark.parametrize("shared", [False, True])
def test_packed_rows_give_what_single_sequences_do(shared):
    """Hidden states and log-probabilities of each response, one by one, and the gradient, in
    float64 to 1e-9."""
    model = Transformer(ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=300, init_std=0.3))
    init_weights(model, 0)
    model.double()
    pairs = made_up(8, 48)
    pairs += [
        dataclasses.replace(pairs[0], rejected=pairs[0].chosen),
        dataclasses.replace(pairs[1], chosen=[7]),
    ]
    rows = pack(to_sequences(pairs), 48)
    assert len(rows.tokens) < 2 * len(pairs)
    packed = loop.response_hidden_states(
        model, (share_prefixes(rows) if shared else rows).to("cpu")
    )
    factors, products = (
        torch.randn(packed.shape, generator=torch.Generator().manual_seed(0)).double(),
        0,
    )
    for i, (prompt, response) in enumerate(to_sequences(pairs)):
        hidden, is_own = (
            model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1],
            rows.sequence == i,
        )
        torch.testing.assert_close(packed[is_own], hidden, rtol=1e-9, atol=1e-9)
        a, b = (
            (states @ model.lm_head.weight.T).log_softmax(-1)[range(len(response)), response]
            for states in (packed[is_own], hidden)
        )
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        products += (hidden * factors[is_own]).sum()
    weights = [w for name, w in model.named_parameters() if name != "lm_head.weight"]
    for a, b in zip(
        *(torch.autograd.grad(x, weights) for x in ((packed * factors).sum(), products)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_equal_beginnings_are_taken_once():
    """As many places as there are different beginnings; each of them holds its last token, and is
    its own copy."""
    rng = np.random.default_rng(0)
    sequences = [
        (
            rng.integers(1, 3, rng.integers(1, 4)).tolist(),
            rng.integers(1, 3, rng.integers(1, 6)).tolist(),
        )
        for _ in range(40)
    ]
    rows, beginnings = pack(sequences, 16), set()
    shared = share_prefixes(rows)
    for prompt, response in sequences:
        beginnings |= {tuple((prompt + response)[:n]) for n in range(1, len(prompt + response))}
    assert (
        shared.tokens.shape == (1, len(beginnings))
        and len(beginnings) < (rows.tokens > 0).sum() / 2
    )
    assert (shared.index.flatten()[shared.unique] == np.arange(len(beginnings))).all()
    assert (shared.tokens[0] == rows.tokens.flatten()[shared.unique]).all()
    assert (shared.tokens[0][shared.positions] == rows.tokens.flatten()[rows.positions]).all()
    assert shared.targets is rows.targets and shared.sequence is rows.sequence
