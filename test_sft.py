"""sft.py by its real command, and its step beside transformers and TRL, which render, mask and
count on their own."""
from settings import load_config

import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig as TheirConfig
from trl import SFTTrainer

import common
import hf
import sft
from conftest import ROOT
from data.chat.conversations import MAX_CHARACTERS, prepare
from data.chat.packing import Batch, build_batch, plan_stages
from data.chat.test_template import WITH_MASK
from data.tasks import registry
from data.tasks.problem import to_chat
from data.text.mixture import IGNORE
from data.text.test_tokenizer import released_like
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, Transformer, init_weights
from sft import SftConfig, StageConfig

ONE = common.Dist(0, 1, torch.device("cpu"), None)
ASK, SAY = {"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "Blue."}
CALL = [{"name": "add", "arguments": {"a": 1, "b": 2}}]
USE = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def worked(n: int) -> list[list[dict]]:
    """Conversations with reasoning, of uneven lengths."""
    return [to_chat(problem) for problem in registry.family("math").problems("train", n, 1)]


def write(path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- one step

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([message["content"] for talk in worked(50) for message in talk],
                           TokenizerConfig(vocab_size=340))


def new_model(tokenizer) -> Transformer:
    model = Transformer(
        ModelConfig(
            2, 64, 96, 4, 2, 16, vocab_size=tokenizer.n_vocab, init_std=0.2, max_context=512
        )
    )
    init_weights(model, 0)
    return model


def packed(talks, tokenizer, folder, context=256) -> Batch:
    """All conversations in one batch, by way of a pool on disk."""
    write(folder / "talks.jsonl", [{"messages": talk} for talk in talks])
    pools = {
        "p": prepare(folder / "pools", "p", [{"path": str(folder / "talks.jsonl")}], tokenizer)
    }
    (plan,) = plan_stages(
        [StageConfig("s", [1, 1], context, epochs={"p": 1})], pools, 32 * context, 0
    )
    assert plan.n_steps == 1 and not plan.dropped
    return build_batch(plan, pools, 0)


def our_step(model, rows: Batch, micro_tokens=0) -> tuple[float, int, list[torch.Tensor]]:
    """Loss, trained tokens and gradients."""
    model.zero_grad()
    p = SftConfig(stages=[], batch_tokens=rows.tokens.size, micro_tokens=micro_tokens)
    return *sft.train_step(model, rows, p, ONE), [
        parameter.grad.clone() for parameter in model.parameters()
    ]


def test_loss_and_gradient_are_those_of_transformers_and_trl(tokenizer, tmp_path):
    """They have the exported folder and the messages; one masks by the template, the other also
    batches and counts."""
    talks = [*worked(12), USE, [ASK, SAY] * 3]
    model = new_model(tokenizer)
    loss, n, gradients = our_step(model, packed(talks, tokenizer, tmp_path))
    hf.export(model, tokenizer, tmp_path / "hf", torch.float32)
    theirs, their_tokenizer = (
        kind.from_pretrained(tmp_path / "hf") for kind in (LlamaForCausalLM, AutoTokenizer)
    )
    their_tokenizer.chat_template = WITH_MASK

    nats, count = 0, 0
    for talk in talks:
        out = their_tokenizer.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = (torch.tensor([out[key]]) for key in ("input_ids", "assistant_masks"))
        labels = torch.where(mask > 0, ids, -100)
        nats = nats + theirs(ids, labels=labels).loss * mask.sum()
        count += int(mask.sum())
    (nats / count).backward()
    assert n == count and loss == pytest.approx((nats / count).item(), abs=1e-5)
    their_gradients = dict(theirs.named_parameters())
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        expected = their_gradients[hf._hf_name(name)].grad
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), name

    trainer = SFTTrainer(
        theirs,
        processing_class=their_tokenizer,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        args=TheirConfig(
            str(tmp_path / "trl"),
            assistant_only_loss=True,
            max_length=None,
            per_device_train_batch_size=5,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
        ),
    )
    batches, their_count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 3, torch.device("cpu")
    )
    their_loss = sum(
        trainer.compute_loss(theirs, b, num_items_in_batch=their_count).item() for b in batches
    )
    assert len(batches) == 3 and their_count == n and loss == pytest.approx(their_loss, abs=1e-5)


def test_accumulation_does_not_change_the_gradient(tokenizer):
    """1 x 8 rows = 8 x 1 = plain PyTorch's, to 1e-9; two rows have no trained token, one of them
    the last."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, tokenizer.n_vocab, (2, 8, 16))
    weights = rng.choice([0, 0.5, 1], (8, 16)).astype(np.float32)
    weights[[3, 7]] = 0
    rows = Batch(tokens, np.where(weights > 0, targets, IGNORE), weights,
                 np.where(np.arange(16) < 6, 0, 6).astype(np.int32)[None].repeat(8, 0))
    model = new_model(tokenizer).double()
    loss, n, together = our_step(model, rows)
    _, _, alone = our_step(model, rows, micro_tokens=16)
    model.zero_grad()
    logits = (
        model(torch.from_numpy(tokens), torch.from_numpy(rows.doc_start)) @ model.lm_head.weight.T
    )
    losses = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none"
    )
    expected = (losses * torch.from_numpy(weights).flatten()).sum() / weights.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6) and n == (weights > 0).sum()
    for a, b, parameter in zip(together, alone, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_trained_token(tokenizer, tmp_path):
    """The least that there can be: the loss is that token's."""
    rows = packed([[ASK, SAY]], tokenizer, tmp_path, context=64)
    rows.weights[:, :np.flatnonzero(rows.weights[0])[-1]] = 0
    model = new_model(tokenizer)
    loss, n, gradients = our_step(model, rows, micro_tokens=64)
    logits = (
        model(torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_start))
        @ model.lm_head.weight.T
    )
    chance = logits[0, np.flatnonzero(rows.weights[0])].softmax(-1)[0, tokenizer.im_end]
    assert n == 1 and loss == pytest.approx(-chance.log().item(), abs=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_token_weights_are_plain_arithmetic():
    """Value and gradients in float64; an ignored target counts for nothing, whatever its weight."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 24, generator=generator).double().requires_grad_() for n in (50, 90)
    )
    targets = torch.randint(90, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)
    weights[::5], targets[1::5] = 0, IGNORE
    plain = (
        F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE)
        @ weights.double()
    )
    ours = linear_cross_entropy(hidden, weight, targets, token_weights=weights)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss / 3, (hidden, weight)) for loss in (ours, plain))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_turn_of_weight_0_gives_no_gradient(tokenizer, tmp_path):
    """Read back from the gradient itself: the text that is trained, and how much."""
    talk = [
        ASK,
        SAY | {"weight": 0},
        ASK,
        {"role": "assistant", "content": "Red.", "weight": 0.5},
        *USE,
    ]
    rows, model, outputs = packed([talk], tokenizer, tmp_path), new_model(tokenizer), []
    model.norm.register_forward_hook(
        lambda module, inputs, output: output.retain_grad() or outputs.append(output)
    )
    loss, n, _ = our_step(model, rows)
    trained = outputs[0].grad[0].abs().sum(-1).numpy() > 0
    assert tokenizer.decode(rows.tokens[0, 1:][trained[:-1]].tolist()) == (
        'Red.<|im_end|><tool_call>\n{"name": "add", "arguments": {"a": 1, "b": '
        '2}}\n</tool_call><|im_end|>'
        "It is 3.<|im_end|>"
    )
    assert n == trained.sum() and not outputs[0].grad[1:].any()
    halved = rows.weights[0][trained] == 0.5
    assert tokenizer.decode(rows.targets[0][trained][halved].tolist()) == "Red.<|im_end|>"


# ---- whole runs

CONFIG = """
from mini import *
sft = dict(
    lr=5e-3, batch_tokens=1536, save_every=3, keep=99, log_every=2, prompts=["1 + 1?"],
    pools=dict(math=[dict(path="math.jsonl")], tools=[dict(path="tools.jsonl")]),
    stages=[
        dict(name="cold start", lr=[1, 1], context=192, conversations=75, mixture=dict(math=1)),
        dict(name="overall", lr=[1, 0.1], context=256, rope_theta=200.0,
             epochs=dict(math=1, tools=1)),
    ])
"""


@pytest.fixture(scope="module")
def base(base):
    """With pools and a config."""
    mini = base
    (mini.folder / "mini_sft.py").write_text(CONFIG)
    write(mini.folder / "math.jsonl", [{"messages": talk} for talk in worked(60)])
    write(
        mini.folder / "tools.jsonl",
        [{"messages": [ASK, SAY | {"weight": i % 3 / 2}, *USE * (1 + i % 2)]} for i in range(24)],
    )
    return mini


def fine_tune(mini, run: str, *options: str, ranks: int = 0) -> str:
    return mini.run(
        str(ROOT / "sft.py"),
        "mini_sft.py",
        f"--name={run}",
        "--init_from=out/base/pretrain",
        *options,
        ranks=ranks,
    )


def losses(mini, run: str) -> list[float]:
    return [
        line["loss"]
        for line in common.read_metrics(mini.folder / "out" / run / "sft")
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def whole(base) -> str:
    return fine_tune(base, "tuned")


def test_what_a_user_sees(base, whole):
    folder = base.folder / "out/tuned/sft"
    assert re.search(
        r"pool tools: 24 rows of 24 conversations, [\d,]+ tokens, [\d,]+ of them trained; bad "
        r"lines: 0",
        whole,
    )
    assert re.search(r"stage +steps +tokens +trained +filled +too long", whole)
    assert re.search(
        r"\noverall .* [89]\d\.\d% +12  5.00e-03 -> 5.00e-04 +256  math 1.00, tools 1.00\n", whole
    )
    assert (
        "before, in document form" in whole
        and "before, in chat form" in whole
        and "  > 1 + 1?\n  | " in whole
    )
    assert re.search(r"task +before +asked in +after +gain\nmath .* (document|chat) ", whole)
    before = json.loads((folder / "before.json").read_text())
    assert before["math"]["prompt_format"] in ("document", "chat") and before["math"]["n"] == 4
    assert losses(base, "tuned")[4] < losses(base, "tuned")[0] - 0.5  # the end of the cold start


def test_what_the_phase_before_found_is_not_asked_again(base, whole):
    """Of its last evaluation, in chat form; but of other weights or questions nothing is known."""
    earlier = base.folder / "out/tuned/sft"
    scores = json.loads((earlier / "scores.json").read_text())
    (name,) = scores
    scores[name]["avg"] = 0.4321  # to be known again by
    (earlier / "scores.json").write_text(json.dumps(scores))

    def scores_before(run: str, *options: str) -> dict:
        fine_tune(base, run, "--scale=0.1", *options)
        before = json.loads((base.folder / "out" / run / "sft/before.json").read_text())
        return before["math"]

    start = "--init_from=out/tuned/sft"
    known = scores_before("known", start)
    assert (known["avg"], known["prompt_format"]) == (0.4321, "chat")
    assert scores_before("more", start, "--evaluate.n_problems=5")["avg"] != 0.4321
    assert scores_before("others", f"{start}/step_00000006")["avg"] != 0.4321


def test_the_rotary_base_is_taken_over(base, whole):
    """Pre-training raised it to 100; the cold start says nothing, the second stage raises it to
    200."""
    bases = {}
    for path in common.list_checkpoints(base.folder / "out/tuned/sft"):
        meta = common.read_meta(path)
        bases.setdefault(meta["stage"], set()).add(meta["model"]["rope_theta"])
    assert bases == {"cold start": {100.0}, "overall": {200.0}}


def test_resume_is_exact_to_the_bit(base, whole):
    """What a machine that died in the second stage leaves behind."""
    shutil.copytree(base.folder / "out/tuned", base.folder / "out/tuned-again")
    kept = [path for path in common.list_checkpoints(base.folder / "out/tuned-again/sft")
            if int(path.name[5:]) <= 6 or shutil.rmtree(path)]
    assert common.read_meta(kept[0])["stage"] == "overall"
    output = fine_tune(base, "tuned-again")
    assert (
        "(step 6)" in output
        and "before, in chat form" not in output
        and "pool math: ready" in output
    )
    assert losses(base, "tuned-again") == losses(base, "tuned") and len(losses(base, "tuned")) == 11
    ends = [
        hf.load(base.folder / "out" / run / "sft")[0].parameters()
        for run in ("tuned-again", "tuned")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_two_ranks_take_the_same_steps(base, whole, monkeypatch):
    """Uneven rows, several passes a rank; in the last step one row is left for two: a rank without
    a trained token."""
    output = fine_tune(
        base,
        "tuned-ranks",
        "--sft.micro_tokens=256",
        "--sft.compare=false",
        "--sft.prompts=[]",
        "--evaluate.tasks=[]",
        ranks=2,
    )
    assert "2 process(es)" in output
    assert losses(base, "tuned-ranks") == pytest.approx(losses(base, "tuned"), abs=1e-4)
    monkeypatch.chdir(base.folder)
    cfg = load_config("", ["mini_sft.py", "--run=tuned-ranks"], sft=SftConfig)
    stages = cfg.sft.stages
    pools = sft.open_pools(
        cfg,
        stages,
        Tokenizer.load(common.list_checkpoints(cfg.out / "sft")[0] / "tokenizer.json"),
        ONE,
    )
    plan = plan_stages(stages, pools, cfg.sft.batch_tokens, cfg.sft.seed)[-1]
    assert len(plan.ends) % plan.rows == 1


# ---- bad input, in this process: the same main(), without another start of Python

def attempt(base, monkeypatch, *options: str) -> None:
    base.call(
        sft.main, "sft.py", "mini_sft.py", "--init_from=out/base/pretrain", *options
    )


BAD = {  # a line, and what is said of it
    "torn": ('{"messages": [', "Expecting value"),
    "role": (
        json.dumps({"messages": [{"role": "wizard", "content": "Hi."}, SAY]}),
        "message 0 has the unknown role 'wizard'",
    ),
    "user last": (json.dumps({"messages": [ASK, SAY, ASK]}), "the conversation ends with the user"),
    "empty": (
        json.dumps({"messages": [ASK, {"role": "assistant", "content": " "}]}),
        "message 1 is an assistant's, and empty",
    ),
    "call": (
        json.dumps(
            {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": "add(1, 2)"}]}
        ),
        "message 1 has tool calls that are no JSON: 'add(1, 2)'",
    ),
    "huge": (
        json.dumps({"messages": [ASK, SAY | {"content": "x" * (MAX_CHARACTERS + 1)}]}),
        "message 1 has 1,000,001 characters",
    ),
}
ONLY_BAD = ["--sft.pools={'bad': [{'path': 'bad.jsonl'}]}",
            "--sft.stages=[{'name': 's', 'lr': [1, 1], 'context': 192, 'epochs': {'bad': 1}}]"]


def test_bad_lines_are_counted_and_the_first_is_named(base, monkeypatch, capsys):
    """And --prepare stops before the training, with the pool and the plan."""
    good = json.dumps({"messages": [ASK, SAY]})
    (base.folder / "bad.jsonl").write_text(
        "\n".join([good, *(line for line, _ in BAD.values()), good])
    )
    attempt(base, monkeypatch, "--run=bad-skip", "--prepare", *ONLY_BAD)
    out = capsys.readouterr().out
    assert (
        "pool bad: 2 rows of 2 conversations" in out
        and f"bad lines: {len(BAD)} (the first: bad.jsonl:2: " in out
    )
    assert re.search(r"\ns +1 .*bad 1.00\n", out)
    assert (base.folder / "out/bad-skip/sft/data/bad/tokens.bin").is_file()
    assert not common.list_checkpoints(base.folder / "out/bad-skip/sft")


@pytest.mark.parametrize("kind", BAD)
def test_on_bad_line_stop(base, monkeypatch, capsys, kind):
    line, message = BAD[kind]
    (base.folder / "bad.jsonl").write_text(f"{json.dumps({'messages': [ASK, SAY]})}\n{line}\n")
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad-stop", "--sft.on_bad_line=stop", *ONLY_BAD)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: pool 'bad': bad.jsonl:2: ")
        and message in error
        and len(error) < 300
    )


def test_weights_whose_own_tokenizer_is_not_made_for_chats(base, monkeypatch, capsys):
    """As Nanbeige4-3B-Base's: they go on with tokenizer.path, and the checkpoint keeps it all."""
    monkeypatch.chdir(base.folder)
    shape = load_config("", ["mini_sft.py"], model=ModelConfig).model
    shape.vocab_size = 960
    model = Transformer(shape)
    init_weights(model, 0)
    hf.export(model, Tokenizer(released_like("base")), "released", torch.float32)
    (base.folder / "chat.json").write_text(released_like())
    stage = "[{'name': 's', 'lr': [1, 1], 'context': 768, 'epochs': {'math': 0.2}}]"
    options = ["--init_from=released", f"--sft.stages={stage}", "--evaluate.tasks=[]"]
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=none", "--prepare", *options)
    assert "tokenizer.json has no token for turn start" in capsys.readouterr().err
    attempt(base, monkeypatch, "--run=chat", "--tokenizer.path=chat.json", *options)
    (folder,) = common.list_checkpoints(base.folder / "out/chat/sft")
    tokenizer = hf.load_tokenizer(folder)
    assert tokenizer.json == released_like() and tokenizer.ids == {"bos": 1, "eot": 2, "eos": [2]}
    assert common.read_meta(folder)["tokenizer"] == tokenizer.hash
    attempt(base, monkeypatch, "--run=chat", "--tokenizer.path=chat.json", *options)
    assert "going on from" in capsys.readouterr().out


def test_a_named_pool_beside_those_of_the_folder(base, monkeypatch, capsys):
    """Each by itself in its own place; the named one is not looked for in the folder."""
    folder = base.folder / "made"
    folder.mkdir()
    for name, n in (("tools", 3), ("math", 5)):
        text = json.dumps({"messages": [ASK, SAY]}) + "\n"
        (folder / f"{name}.jsonl").write_text(text * n)
    (base.folder / "own.jsonl").write_text(text * 7)
    attempt(base, monkeypatch, "--run=beside", "--prepare", "--sft.data=made",
            "--sft.pools={'math': [{'path': 'own.jsonl'}]}")
    out = capsys.readouterr().out
    assert "pool math: 7 rows" in out and "pool tools: 3 rows" in out


@pytest.mark.parametrize("options, message", [
    (["--sft.stages=[{'name': 's', 'lr': [1, 1], 'context': 192, 'mixture': {'maths': 1}, "
      "'conversations': 9}]"],
     "the stages take from pool 'maths'; sft.pools has math, tools"),
    (["--sft.stages=[{'name': 's', 'lr': [1, 1], 'context': 192, 'mixture': {'math': 1}}]"],
     "stage 's' must have either a mixture and one of conversations and trained_tokens, or epochs "
     "alone"),
    (["--init_from=nowhere"], "nowhere is no checkpoint: neither a phase's folder like "
                              "out/tiny/pretrain nor"),
    (["--sft.pools={'math': [{'path': 'none.jsonl'}], 'tools': [{'path': "
      "'tools.jsonl'}]}"], "none.jsonl"),
    (["--sft.on_bad_line=ignore"], "sft.on_bad_line must be one of 'skip', 'stop', not 'ignore'"),
    (["--sft.over_long=split"], "sft.over_long must be one of 'drop', 'cut', not 'split'"),
    (["--sft.batch_tokens=1000"], "batch_tokens=1000 is no multiple of its context 192"),
    (["--model.n_layers=3"], "has n_layers = 2, this run's model has 3: set model.n_layers"),
])
def test_bad_settings_are_one_line(base, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
