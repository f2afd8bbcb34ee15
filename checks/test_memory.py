"""What checks.memory counts, beside what a process allocates; and that the cache has no copy."""
import dataclasses
import itertools

import pytest
import torch
import torch.distributed

import common
import generate
import reward
from checks import memory, sizes
from checks.memory import allocated
from common import UserError
from generate import row_bytes, sample
from model import KVCache, ModelConfig, Transformer, init_weights

CACHED = ModelConfig(8, 32, 64, 4, 4, 16, vocab_size=64, kernels="torch")  # mostly cache
ROWS, PROMPT, NEW = 32, 200, 40


@pytest.fixture(scope="module")
def model():
    model = Transformer(CACHED)
    init_weights(model, 0)
    return model.requires_grad_(False)


def prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(64, (n, PROMPT), generator=generator).tolist()


# ---- the cache


def test_the_cache_grows_in_blocks(model, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", 4)
    tokens = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(1))
    cache = KVCache(CACHED, 0, 11, "cpu", torch.float32)
    parts, rooms = [model(tokens[:, :3], cache=cache)], [cache.layers[-1].shape[3]]
    for column in tokens[:, 3:].split(1, 1):
        parts.append(model.decode(column, cache.next_step()))
        rooms.append(cache.layers[-1].shape[3])
    assert rooms == [4, 4, 8, 8, 8, 8, 11, 11, 11] and cache.lengths == [11, 11]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


def test_moves_and_growth_hold_one_layer_more(monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", PROMPT)
    cache = KVCache(CACHED, 0, 4 * PROMPT, "cpu", torch.float32)
    layer = ROWS * PROMPT * 2 * 4 * 16 * 4  # bytes of keys and values of a layer, a block each row
    whole = CACHED.n_layers * layer
    assert whole <= allocated(lambda: cache.reserve(ROWS, PROMPT)) <= 1.01 * whole
    cache.lengths = [PROMPT] * ROWS
    places = [(row, row - 4) for row in range(4, ROWS)]
    assert allocated(lambda: cache.copy(cache, places)) <= 1.1 * layer
    # grows from one block to two of 28 rows, while each layer's old one goes
    growth = allocated(lambda: cache.reserve(28, PROMPT + 1))
    assert growth <= 2 * 28 / 32 * whole - whole + 2.1 * layer
    assert all(tensor.shape == (28, 2, 4, 2 * PROMPT, 16) for tensor in cache.layers)


def test_places_of_ended_rows_are_used_again(model):
    """Twice as many prompts through as many rows take no more memory."""
    def work(n):
        return sample(model, prompts(n), max_new_tokens=NEW, stop=tuple(range(8)), seed=1,
                      max_rows=ROWS)

    lengths = {len(answer.tokens) for (answer,) in work(ROWS)}
    assert len(lengths) > 10  # ragged
    assert allocated(lambda: work(2 * ROWS)) < 1.05 * allocated(lambda: work(ROWS))


# ---- rows by free memory


def test_as_many_rows_as_fit(model, monkeypatch):
    """5 x 3 samples through a memory that takes 4 rows, then 2: the same samples."""
    def draw():
        return sample(model, prompts(5), n=3, max_new_tokens=6, seed=2)

    seen, decode = [], generate.decode

    def watched_decode(*arguments):
        for rows in decode(*arguments):
            seen.append(len(rows))
            yield rows

    expected = draw()
    monkeypatch.setattr(generate, "decode", watched_decode)
    row = row_bytes(CACHED, torch.float32, PROMPT, 6)
    for fitting, most in ((4.5, 4), (2.5, 2)):
        monkeypatch.setattr(common, "free_memory", lambda device: fitting * row / 0.8)
        tokens = [[answer.tokens for answer in group] for group in draw()]
        assert tokens == [[answer.tokens for answer in group] for group in expected]
        assert max(seen) == most
        seen.clear()


def test_what_cannot_fit_is_one_line(model, monkeypatch):
    row = row_bytes(CACHED, torch.float32, PROMPT, NEW)
    monkeypatch.setattr(common, "free_memory", lambda device: row / 2)
    with pytest.raises(UserError, match=r"a row of 200 \+ 40 tokens needs 0.00 GB, more than"):
        sample(model, prompts(4), max_new_tokens=NEW)


def test_rows_take_what_arithmetic_says(model, monkeypatch):
    monkeypatch.setattr(generate, "PASS_TOKENS", 2 * PROMPT)
    bound = ROWS * row_bytes(CACHED, torch.float32, PROMPT, NEW)
    assert 0.8 * bound < allocated(lambda: sample(model, prompts(ROWS), max_new_tokens=NEW)) < bound


def test_the_judge_takes_what_arithmetic_says():
    """A pass without gradients of a model whose MLP is as wide, for its width, as the 3B's."""
    cfg = dataclasses.replace(CACHED, hidden_size=64, ffn_size=256, n_heads=4, n_kv_heads=1)
    model = Transformer(cfg).requires_grad_(False)
    init_weights(model, 0)
    tokens = torch.zeros(64, 64, dtype=torch.int64)
    bound = tokens.numel() * generate.pass_bytes_per_token(cfg, torch.float32)
    assert 0.8 * bound < allocated(lambda: model(tokens)) < 1.05 * bound


def test_the_judge_passes_no_more_tokens_than_its_limit(monkeypatch):
    judge = reward.RewardModel.__new__(reward.RewardModel)
    judge.known, judge.too_long, judge.letters = {}, 0, (1, 2)
    judge.context, judge.max_rows, judge.tokenizer = 2000, 32, None
    sizes_seen = []

    def hidden_states(model, rows):
        sizes_seen.append(rows["tokens"].numel())
        return torch.zeros(len(rows["positions"]), 4)

    judge.model = torch.nn.Module()
    judge.model.lm_head = torch.nn.Linear(4, 3).requires_grad_(False)
    monkeypatch.setattr(reward.loop, "response_hidden_states", hidden_states)
    monkeypatch.setattr(reward, "PASS_TOKENS", 4096)
    lengths = [5, 300, 700, 1300, 900, 20, 1300, 400]
    margins = judge.margins([(n,) for n in lengths], lambda n, tokenizer: [0] * n)
    assert len(margins) == len(lengths) and len(sizes_seen) > 1 and max(sizes_seen) <= 4096


# ---- training: the tracker beside a real process

TINY = """
model = dict(n_layers=3, hidden_size=64, ffn_size=192, n_heads=4, n_kv_heads=2, head_dim=16,
             vocab_size=512)
pretrain = dict(batch_tokens=1024, micro_tokens=256, dtype="bfloat16", stages=[
    dict(name="s", tokens=10_000, lr=[1, 1], context=64, mixture=dict(high=1))])
sft = pretrain | dict(recompute=True, stages=[
    dict(name="s", lr=[1, 1], context=32, epochs=dict(a=1))])
distill = dict(teacher="x", problems=dict(math=1), context=64, max_new_tokens=40, batch_pairs=8,
               micro_pairs=4, dtype="bfloat16")
reward = dict(preferences=[dict(taste=1)], context=64, batch_pairs=4, micro_pairs=2,
              dtype="bfloat16")
rl = dict(stages=[dict(name="s", problems=dict(math=1), steps=1)], context=64, group_size=4,
          batch_groups=2, micro_rows=4, max_new_tokens=50, kl=0.1, dtype="bfloat16")
"""


@pytest.fixture
def no_group():
    """No process group of another test's, nor one that is left to another."""
    def leave():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    leave()
    yield
    leave()


def train_for_real(case, model_config, dist) -> None:
    """Model, optimizer and two steps, on tensors with data."""
    model_config = dataclasses.replace(model_config, kernels="torch")
    model, optimizer = memory.loop.build_model(model_config, case.cfg, dist)
    init_weights(model, 0, common.assign)
    frozen = [memory.frozen_model(model_config, case.cfg, dist) for _ in range(case.n_frozen)]
    for other in frozen:
        init_weights(other, 1, common.assign)
    memory.train(case, model, frozen, optimizer, dist)


@pytest.mark.parametrize("phases", [
    ["pretrain", "distill"],
    pytest.param(["sft", "reward", "rl"], marks=pytest.mark.long),
])
def test_training_takes_what_the_tracker_says(no_group, tmp_path, phases):
    """bf16, one rank of FSDP: within 15 % of what PyTorch's allocator gave."""
    (tmp_path / "tiny.py").write_text(TINY)
    config = memory.read_config([str(tmp_path / "tiny.py")])
    with memory.fake_group(1) as dist:
        cases = [dataclasses.replace(case, n_copies=0) for case in memory.cases(config, 1)
                 if case.name.partition(",")[0] in phases]
        tracked = [memory.measure(case, config.model, dist, like_gpu=False) for case in cases]
    dist = common.init_distributed("bfloat16")
    assert len(cases) == len(phases)
    for case, parts in zip(cases, tracked):
        real = allocated(lambda: train_for_real(case, config.model, dist)) / 1e9
        assert sum(parts.values()) == pytest.approx(real, rel=0.15), case.name


def test_ranks_share_and_gradients_wait(no_group, tmp_path):
    """8 ranks hold an eighth of weights and AdamW; a step of two passes has a whole fp32 gradient
    besides, a step of one has not."""
    (tmp_path / "tiny.py").write_text(TINY)
    found = {}
    for gpus, micro in itertools.product((1, 8), (64, 1024)):
        config = memory.read_config([str(tmp_path / "tiny.py"), f"--pretrain.micro_tokens={micro}"])
        with memory.fake_group(gpus) as dist:
            case = memory.cases(config, gpus)[0]
            found[gpus, micro] = memory.measure(case, config.model, dist)
    n = sizes.count_parameters(sizes.meta_model(config.model))["total"]
    assert found[8, 1024]["weights"] == pytest.approx(4 * n / 8 / 1e9, rel=0.02)
    assert found[8, 1024]["AdamW"] == pytest.approx(8 * n / 8 / 1e9, rel=0.02)
    assert found[1, 1024]["AdamW"] == pytest.approx(8 * n / 1e9, rel=0.02)
    for gpus in (1, 8):
        assert found[gpus, 64]["not reduced"] > 0.6 * 4 * n / 1e9
        assert found[gpus, 1024]["not reduced"] < 0.5 * 4 * n / 1e9


def test_the_table(no_group, tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    cases = memory.cases
    monkeypatch.setattr(memory, "cases", lambda *arguments: cases(*arguments)[:2])  # for time
    monkeypatch.setattr("sys.argv", ["memory", str(tmp_path / "tiny.py"), "--gpus", "2"])
    memory.main()
    output = capsys.readouterr().out
    for name in ("pretrain, 64", "sft, 32", "rl's judge, 65,536 tokens",
                 "evaluate.py, 256 rows of "):
        assert f"\n{name}" in output
    assert "NO" not in output and "\n2 GPUs of 150.1 GB; fits: with 10% to spare" in output
