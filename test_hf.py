"""hf.py and model.py against transformers: the same logits from the same files, both ways."""

import dataclasses
import json
from pathlib import Path

import jinja2
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import common
import hf
from checks import warm
from common import UserError
from data.chat.template import render
from data.text.test_tokenizer import CHAT, released_like
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from loop import as_json
from model import KVCache, ModelConfig, Transformer, meta_model

V = 320
#        H  K  D   C   tied   RoPE base
SHAPES = {
    "GQA 4/2": (4, 2, 16, 64, False, 10000.0),
    "GQA 5/1": (5, 1, 16, 80, True, 5e6),
    "GQA 6/3, wide heads": (6, 3, 32, 96, False, 7e7),
    "MHA": (4, 4, 16, 64, True, 500.0),
    "odd MHA, narrow heads": (3, 3, 8, 48, False, 1e4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(scope="module")
def tokenizer():
    text = "a small text, to be taught from; a small text to be read. "
    return train_tokenizer([text * 20], TokenizerConfig(vocab_size=V))


def our_model(shape=SHAPES["GQA 4/2"], **changes) -> Transformer:
    H, K, D, C, tied, theta = shape
    cfg = ModelConfig(
        n_layers=2,
        hidden_size=C,
        ffn_size=3 * C // 2,
        n_heads=H,
        n_kv_heads=K,
        head_dim=D,
        vocab_size=V,
        tie_embeddings=tied,
        rope_theta=theta,
        max_context=256,
    )
    return randomize(Transformer(dataclasses.replace(cfg, **changes)))


def their_model(shape) -> LlamaForCausalLM:
    H, K, D, C, tied, theta = shape
    return randomize(
        LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2,
                hidden_size=C,
                intermediate_size=3 * C // 2,
                num_attention_heads=H,
                num_key_value_heads=K,
                head_dim=D,
                vocab_size=V,
                tie_word_embeddings=tied,
                rms_norm_eps=3e-5,
                max_position_embeddings=256,
                rope_parameters={"rope_theta": theta, "rope_type": "default"},
            )
        )
    )


@torch.no_grad()
def randomize(model):
    """Weights large enough that every part counts: positions, norms and gates."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(
            1 + 0.3 * noise if parameter.ndim == 1 else 1.5 * noise / parameter.shape[1] ** 0.5
        )
    return model.eval()


@torch.no_grad()
def logits(model, tokens, **kwargs):
    if isinstance(model, Transformer):
        return model(tokens, **kwargs) @ model.lm_head.weight.T
    return model(tokens, **kwargs).logits


def tokens_like(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# --------------------------------------------------------------------------------------------------
# The same function


@every_shape
def test_logits_of_their_folder(shape, tokenizer, tmp_path):
    theirs = their_model(shape)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    ours, _ = hf.load(tmp_path)
    assert_equal(logits(ours, tokens_like(2, 100)), logits(theirs, tokens_like(2, 100)))


@every_shape
def test_logits_of_our_export(shape, tokenizer, tmp_path):
    ours = our_model(shape)
    ours.rope_theta *= 10  # a stage of training has raised it since
    hf.export(ours, tokenizer, tmp_path / "export", torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert_equal(logits(ours, tokens_like(2, 100)), logits(theirs, tokens_like(2, 100)))
    again, _ = hf.load(tmp_path / "export")
    assert torch.equal(logits(again, tokens_like(2, 100)), logits(ours, tokens_like(2, 100)))


def test_every_field_of_the_config_comes_back(tokenizer, tmp_path):
    cfg = dataclasses.replace(
        our_model().cfg, norm_eps=3e-6, init_std=0.01, max_context=77, tie_embeddings=True
    )
    hf.export(randomize(Transformer(cfg)), tokenizer, tmp_path / "export")
    assert hf.config_from_hf(tmp_path / "export") == cfg


@every_shape
def test_cached_decoding_equals_each_row_alone(shape):
    """Rows of unequal lengths: prompts in one pass, then a token at a time."""
    model, tokens, prompts = our_model(shape), tokens_like(3, 24), [14, 11, 3]
    cache = KVCache(model.cfg, 0, 24, "cpu", torch.float32)
    steps = [logits(model, tokens[:, :14], cache=cache)]
    cache.lengths = list(prompts)
    for t in range(10):
        column = torch.stack([row[n + t] for row, n in zip(tokens, prompts)])
        with torch.no_grad():
            hidden = model.decode(column[:, None], cache.next_step())
        steps.append(hidden @ model.lm_head.weight.T)
    for row, n in enumerate(prompts):
        alone = logits(model, tokens[row : row + 1, : n + 10])
        decoded = torch.cat([step[row : row + 1] for step in steps[1:]], 1)
        assert_equal(steps[0][row : row + 1, :n], alone[:, :n])
        assert_equal(decoded, alone[:, n:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_equal_separate_ones_and_transformers(attention, tokenizer, tmp_path):
    model, tokens = our_model(), tokens_like(1, 30)
    starts, ends = [0, 7, 8, 20], [7, 8, 20, 30]
    doc_start = torch.tensor(
        [[s for s, e in zip(starts, ends) for _ in range(s, e)]], dtype=torch.int32
    )
    packed = logits(model, tokens, doc_start=doc_start)
    alone = torch.cat([logits(model, tokens[:, s:e]) for s, e in zip(starts, ends)], 1)
    assert_equal(packed, alone)
    hf.export(model, tokenizer, tmp_path / "export", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation=attention
    )
    # transformers keeps packed documents apart by restarted positions alone: no mask, no cache
    positions = torch.arange(30)[None] - doc_start
    assert_equal(packed, logits(theirs, tokens, position_ids=positions, use_cache=False))


# --------------------------------------------------------------------------------------------------
# The same files


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_weights(tied, tokenizer, tmp_path, monkeypatch):
    ours = our_model(tie_embeddings=tied)
    monkeypatch.setattr(hf, "SHARD_BYTES", 50_000)
    hf.export(ours, tokenizer, tmp_path / "export", torch.float32)
    shards = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    biggest = ours.embed_tokens.weight.nbytes
    assert all(sum(t.nbytes for t in load_file(s).values()) <= max(50_000, biggest) for s in shards)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_equal(logits(ours, tokens_like(2, 30)), logits(theirs, tokens_like(2, 30)))

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert not (tmp_path / "theirs/model.safetensors").exists()
    tokenizer.save(tmp_path / "theirs/tokenizer.json")
    again, _ = hf.load(tmp_path / "theirs")
    assert torch.equal(logits(again, tokens_like(2, 30)), logits(ours, tokens_like(2, 30)))


def test_bfloat16_export(tokenizer, tmp_path):
    ours = our_model()
    hf.export(ours, tokenizer, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    assert all(
        file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "export").iterdir()
    )  # a server may read it
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight.bfloat16())
    in_bf16, _ = hf.load(tmp_path / "export", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in in_bf16.parameters())


def test_loading_goes_through_assign(tmp_path):
    ours = our_model()
    hf._save_weights(ours, tmp_path, torch.float32)
    seen = {}
    hf.load_safetensors(
        meta_model(ours.cfg), tmp_path, lambda parameter, full: seen.setdefault(id(parameter), full)
    )
    assert all(
        torch.equal(full, p) for full, p in zip(seen.values(), ours.parameters(), strict=True)
    )


def test_tokenizer_and_generation_config(tokenizer, tmp_path):
    hf.export(our_model(), tokenizer, tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = "a small text, 123 ünïcode 大 \n\n  of it"
    assert theirs(text).input_ids == [
        tokenizer.bos,
        *tokenizer.encode(text),
    ]  # as pre-training documents begin
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (
        "<s>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    messages = [{"role": "user", "content": "a question?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == render(messages, tokenizer, add_generation_prompt=True)
    settings = GenerationConfig.from_pretrained(tmp_path / "export")
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.95, True)
    assert set(settings.eos_token_id) == {tokenizer.im_end, tokenizer.eot}
    assert hf.load(tmp_path / "export")[1].hash == tokenizer.hash


def hf_folder(folder: Path, text: str, **configs) -> Path:
    """A folder with a tokenizer.json and configs, but no weights."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    for name, config in ({"config": {}} | configs).items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def test_ends_come_from_a_checkpoints_configs(tmp_path):
    """By id, several, or a name, in any of its three files."""
    chat = Tokenizer(released_like())
    start, end, document_end = (chat.special[name] for name in CHAT[:3])
    cases = [
        ({}, {}, {}, 1, document_end, ()),
        # as Nanbeige4.1-3B has it
        ({"bos_token_id": start, "eos_token_id": end}, {}, {}, start, document_end, (end,)),
        # Nanbeige4-3B-Base's weights with the tokenizer of the former
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, {}, 1, 2, (2,)),
        ({}, {"eos_token_id": [document_end, end]}, {}, 1, document_end, (end, document_end)),
        ({}, {}, {"bos_token": CHAT[0], "eos_token": {"content": "</s>"}}, start, 2, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [end]}, {}, 1, 2, (2, end)),
        # what nobody has chosen: pieces, unknown ids and names
        ({"bos_token_id": 5, "eos_token_id": [6, 10**6, None]}, {}, {"eos_token": "<end>"},
         1, document_end, ()),
    ]
    for number, (config, generation, of_tokenizer, bos, eot, eos) in enumerate(cases):
        folder = hf_folder(
            tmp_path / str(number),
            released_like(),
            config=config,
            generation_config=generation,
            tokenizer_config=of_tokenizer,
        )
        tokenizer = hf.load_tokenizer(folder)
        assert (tokenizer.bos, tokenizer.eot, tokenizer.eos) == (bos, eot, eos), number
        assert set(tokenizer.stop_ids) == {eot, end, *eos}
    cfg = TokenizerConfig(eot="</s>")
    assert hf.load_tokenizer(tmp_path / "0", cfg).eot == 2


def test_a_text_begins_as_their_tokenizer_says(tokenizer, tmp_path):
    """By its post-processor, or where it has none by its config; an export goes on so."""
    silent = json.loads(tokenizer.json)
    nothing = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
               "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    cases = [
        (released_like(), {}, 1),  # <s>, by its post-processor
        (json.dumps(silent), {"add_bos_token": True}, tokenizer.bos),
        (json.dumps(silent), {}, None),
        (json.dumps(silent | {"post_processor": nothing}), {"add_bos_token": True}, None),
    ]
    for number, (text, config, first) in enumerate(cases):
        folder = hf_folder(tmp_path / str(number), text, tokenizer_config=config)
        ours = hf.load_tokenizer(folder)
        wanted = [first, *ours.encode("so")] if first is not None else ours.encode("so")
        assert ours.encode_prompt("so") == wanted
        hf.export(our_model(vocab_size=1024), ours, tmp_path / f"export{number}")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"export{number}")
        assert theirs("so").input_ids == wanted
        again = hf.load_tokenizer(tmp_path / f"export{number}")
        assert again.encode_prompt("so") == wanted
        (tmp_path / f"ours{number}").mkdir()
        ours.save(tmp_path / f"ours{number}/tokenizer.json")
        (tmp_path / f"ours{number}/meta.json").write_text(json.dumps({"tokenizer_ids": ours.ids}))
        assert hf.load_tokenizer(tmp_path / f"ours{number}").encode_prompt("so") == wanted


TEMPLATE = "{% for m in messages %}{{ bos_token + m.role + m.content }}{% endfor %}"


def test_a_template_is_found_kept_and_exported(tokenizer, tmp_path):
    """In each place where transformers looks; with the tokens that it names; in our checkpoints."""
    text = tokenizer.json
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    folders = {
        "jinja": hf_folder(tmp_path / "jinja", text, tokenizer_config=tokens | {
            "chat_template": "another"}),
        "json": hf_folder(tmp_path / "json", text, tokenizer_config={}, special_tokens_map=tokens,
                          chat_template={"chat_template": TEMPLATE}),
        "config": hf_folder(tmp_path / "config", text,
                            tokenizer_config=tokens | {"chat_template": TEMPLATE}),
        "named": hf_folder(tmp_path / "named", text,
                           tokenizer_config=tokens | {"chat_template": named}),
    }
    (folders["jinja"] / "chat_template.jinja").write_text(TEMPLATE)
    for name, folder in folders.items():
        ours = hf.load_tokenizer(folder)
        assert ours.decode(render([{"role": "user", "content": "so"}], ours)) == "<s>userso"
        assert "own template" in hf.notes_on(folder, ours)[0]
        hf.export(our_model(vocab_size=tokenizer.n_vocab), ours, tmp_path / f"export {name}")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"export {name}")
        assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
        message = [{"role": "user", "content": "so"}]
        assert theirs.apply_chat_template(message, tokenize=False) == "<s>userso"
        (folder / "config.json").unlink()
        meta = {"tokenizer_ids": ours.ids, "chat_template": as_json(ours.chat_template)}
        (folder / "meta.json").write_text(json.dumps(meta))
        again = hf.load_tokenizer(folder)
        assert again.chat_template.texts == ours.chat_template.texts
        assert again.chat_template.tokens == ours.chat_template.tokens
    cfg = TokenizerConfig(chat_template="ours")
    ours = hf.load_tokenizer(tmp_path / "export named", cfg)
    assert ours.chat_template is None
    assert "and not that of" in hf.notes_on(tmp_path / "export named", ours)[0]
    for bad in (7, {"default": 7}, [{"name": "x", "template": "y"}], [7], {}):
        folder = tmp_path / "export json"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": bad}))
        with pytest.raises(UserError, match="tokenizer_config.json: chat_template must be"):
            hf.load_tokenizer(folder)


def test_what_is_said_of_others_folders(tokenizer, tmp_path):
    """No template; ends that differ; how it is sampled."""
    end, other = tokenizer.im_end, tokenizer.special["</s>"]
    folder = hf_folder(
        tmp_path / "f", tokenizer.json, config={"eos_token_id": other},
        generation_config={"eos_token_id": [end, other], "temperature": 0.7, "top_k": 20,
                           "do_sample": True, "repetition_penalty": 1.1, "min_p": 0.0})
    ours = hf.load_tokenizer(folder)
    (folder / "additional_chat_templates").mkdir()
    no_template, more, ends = hf.notes_on(folder, ours)
    assert more.startswith(f"{folder}/additional_chat_templates is not read: ")
    assert no_template == f"{folder} has no chat template: chats have our own form, ChatML"
    assert "</s> <|im_end|> in generation_config.json; </s> in config.json" in ends
    assert {end, other} <= set(ours.stop_ids)
    assert hf.sampling_defaults(folder) == (
        {"temperature": 0.7, "top_k": 20}, ["repetition_penalty = 1.1"])
    for said, message in (({"top_p": 0}, "top_p = 0"), ({"top_k": "x"}, 'top_k = "x"')):
        (folder / "generation_config.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match=f"generation_config.json: {message} must be a number"):
            hf.sampling_defaults(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    assert hf.sampling_defaults(folder)[0] == {"temperature": 0.0}
    hf.export(our_model(), tokenizer, tmp_path / "export")
    assert hf.notes_on(tmp_path / "export", tokenizer) == []


def test_our_template_in_plain_jinja(tokenizer, tmp_path):
    """Without transformers' extensions, as llama-cpp-python has it."""
    hf.export(our_model(), tokenizer, tmp_path / "export")
    config = json.loads((tmp_path / "export/tokenizer_config.json").read_text())
    answer = {"role": "assistant", "content": "b", "reasoning": "c"}
    talk = [{"role": "user", "content": "a?"}, answer]
    for environment in (jinja2.Environment(), ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True)):
        written = environment.from_string(config["chat_template"]).render(messages=talk)
        assert written == tokenizer.decode(render(talk, tokenizer))


def test_another_tokenizer_that_agrees(tmp_path, capsys):
    """Base's weights go on with the tokenizer of the chat models, and end as Base's texts do."""
    base = hf_folder(tmp_path / "base", released_like("base"), config={"eos_token_id": 2})
    (tmp_path / "chat.json").write_text(released_like())
    cfg = TokenizerConfig(path=str(tmp_path / "chat.json"))
    tokenizer = hf.load_tokenizer(base, cfg)
    assert tokenizer.hash != hf.load_tokenizer(base).hash
    assert (tokenizer.im_end in tokenizer.stop_ids, tokenizer.eot) == (True, 2)
    spec = json.loads(released_like())
    spec["added_tokens"][-2]["content"] = "<thought>"
    (tmp_path / "chat.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="base cannot go on with tokenizer.path.*'<thought>'"):
        hf.load_tokenizer(base, cfg)

    cfg = dataclasses.replace(our_model().cfg, vocab_size=1024)
    source = Transformer(cfg)
    hf._save_weights(source, base, torch.float32)
    (base / "config.json").write_text(
        json.dumps(hf._config_json(source, torch.float32) | {"eos_token_id": 2})
    )
    one = common.Dist(0, 1, torch.device("cpu"), None)
    hf.load_initial_weights(one, Transformer(cfg), tokenizer, base)
    assert capsys.readouterr().out == ""
    hf.load_initial_weights(one, Transformer(cfg), Tokenizer(released_like()), base)
    assert "end with </s>, of this run with <|endoftext|>" in capsys.readouterr().out


def test_an_export_of_a_llama_tokenizer(tmp_path):
    """Thoughts after a line break are one token to others, too; no id is behind a gap; texts end
    as they did."""
    for kind in ("chat", "base"):
        ours = Tokenizer(released_like(kind))
        ours.take_ids(eos=[2], bos=ours.special.get("<|im_start|>"))  # the file says <s>
        hf.export(our_model(vocab_size=1024), ours, tmp_path / kind)
        theirs = AutoTokenizer.from_pretrained(tmp_path / kind)
        think, close = ours.special["<think>"], ours.special["</think>"]
        wanted = [*ours.encode("so\n"), think, *ours.encode("\n7 "), close, *ours.encode(" 8")]
        assert theirs("so").input_ids == [ours.bos, *ours.encode("so")]
        assert theirs.encode("so\n<think>\n7 </think> 8", add_special_tokens=False) == wanted
        settings = GenerationConfig.from_pretrained(tmp_path / kind)
        assert {2, ours.eot} <= set(settings.eos_token_id)
        _, again = hf.load(tmp_path / kind)
        assert (again.ids, again.hash) == (ours.ids | {"eos": settings.eos_token_id}, ours.hash)
    messages = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "reasoning": "so", "content": "thus"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == render(messages, Tokenizer(released_like()))


def test_a_checkpoint_of_ours_keeps_its_ends(tmp_path):
    tokenizer = Tokenizer(released_like(), eot="</s>")
    tokenizer.take_ids(eos=[tokenizer.im_end])
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer_ids": tokenizer.ids}))
    again = hf.load_tokenizer(tmp_path)
    assert (again.ids, again.hash) == (tokenizer.ids, tokenizer.hash)
    (tmp_path / "meta.json").write_text("{}")  # of before they were kept
    assert hf.load_tokenizer(tmp_path).ids == Tokenizer(released_like()).ids


def test_who_was_trained_here(tokenizer, tmp_path):
    """Exports are known by their chat template; only others are asked behind a system turn."""
    hf.export(our_model(), tokenizer, tmp_path / "export")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/meta.json").write_text("{}")
    released = hf_folder(tmp_path / "released", released_like(), tokenizer_config={})
    assert [hf.is_ours(path) for path in (tmp_path / "export", tmp_path / "ours", released)] == [
        True,
        True,
        False,
    ]


def test_greedy_text_of_an_export(tokenizer, tmp_path):
    ours = our_model(vocab_size=tokenizer.n_vocab)
    hf.export(ours, tokenizer, tmp_path / "export", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    for prompt in ("a small", "text: ", "123"):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        answer = theirs.generate(
            **inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=40
        )[0]
        tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])
        for _ in range(40):
            token = logits(ours, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, token), 1)
            if token.item() in (tokenizer.im_end, tokenizer.eot):
                break
        assert tokens[0].tolist() == answer.tolist()
        assert tokenizer.decode(tokens[0].tolist()) == their_tokenizer.decode(answer)


# --------------------------------------------------------------------------------------------------
# Our checkpoints


def checkpoint(folder: Path, model: Transformer, tokenizer, step: int, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer.json")
    optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    meta = {"model": dataclasses.asdict(model.cfg) | {"rope_theta": model.rope_theta}}
    one = common.Dist(0, 1, torch.device("cpu"), None)
    return common.save_checkpoint(
        one, folder, step, model, optimizer, meta, tmp_path / "tokenizer.json"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_of_ours(tied, tokenizer, tmp_path, capsys):
    phase = tmp_path / "out/tiny/pretrain"
    old, new = our_model(tie_embeddings=tied), our_model(tie_embeddings=tied, kernels="torch")
    with torch.no_grad():
        old.norm.weight.mul_(0.5)
    new.rope_theta = 77777.0
    step = checkpoint(phase, old, tokenizer, 90, tmp_path)
    newest = checkpoint(phase, new, tokenizer, 100, tmp_path)
    tokens = tokens_like(2, 30)
    for path, expected in ((phase, new), (str(newest), new), (step, old)):
        model, loaded = hf.load(path)
        assert (
            loaded.hash == tokenizer.hash and model.cfg.kernels == "auto"
        )  # that machine's choice is not this one's
        assert torch.equal(logits(model, tokens), logits(expected, tokens))
    in_bf16, _ = hf.load(phase, dtype=torch.bfloat16)
    assert torch.equal(in_bf16.norm.weight, new.norm.weight.bfloat16())
    assert (in_bf16.lm_head.weight is in_bf16.embed_tokens.weight) == tied

    weights = next(newest.glob("__*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    model, _ = hf.load(phase)
    assert torch.equal(logits(model, tokens), logits(old, tokens))
    assert "damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="size and checksum"):
        hf.load(newest)


def test_a_phase_is_found_in_the_run_that_another_starts_from(tokenizer, tmp_path, capsys):
    """`rl.py --run=other --init_from=out/tiny/distill` asks tiny's reward model: other has none."""
    for phase in ("distill", "reward", "teacher/sft"):
        checkpoint(tmp_path / "tiny" / phase, our_model(), tokenizer, 5, tmp_path)
    checkpoint(tmp_path / "other/reward", our_model(), tokenizer, 7, tmp_path)
    one = common.Dist(0, 1, torch.device("cpu"), None)
    for start in ("tiny/distill", "tiny/distill/step_00000005"):
        start = str(tmp_path / start)
        folder = hf.resolve_checkpoint(one, "teacher/sft", tmp_path / "other", start)
        assert folder == tmp_path / "tiny/teacher/sft/step_00000005"
        assert f"note: teacher/sft is {folder.parent}" in capsys.readouterr().out
        folder = hf.resolve_checkpoint(one, "reward", tmp_path / "other", start)
        assert folder == tmp_path / "other/reward/step_00000007"
        assert not capsys.readouterr().out
        with pytest.raises(UserError, match="^verifier/sft is no checkpoint"):
            hf.resolve_checkpoint(one, "verifier/sft", tmp_path / "other", start)


def test_start_from(tokenizer, tmp_path):
    source = our_model()
    checkpoint(tmp_path / "out/pretrain", source, tokenizer, 5, tmp_path)
    hf.export(source, tokenizer, tmp_path / "export", torch.float32)
    one = common.Dist(0, 1, torch.device("cpu"), None)
    for name in (
        "pretrain",
        str(tmp_path / "out/pretrain/step_00000005"),
        str(tmp_path / "export"),
    ):
        model = Transformer(source.cfg)
        assert (
            hf.load_initial_weights(
                one, model, tokenizer, hf.resolve_checkpoint(one, name, tmp_path / "out")
            )
            == source.rope_theta
        )
        assert torch.equal(logits(model, tokens_like(1, 30)), logits(source, tokens_like(1, 30)))
    folder = hf.resolve_checkpoint(one, "pretrain", tmp_path / "out")
    other_heads = our_model(
        n_heads=2, n_kv_heads=1, head_dim=32
    )  # the same shapes, another function
    with pytest.raises(UserError, match="n_heads = 4"):
        hf.load_initial_weights(one, other_heads, tokenizer, folder)
    with pytest.raises(UserError, match="n_layers = 2"):
        hf.load_initial_weights(one, our_model(n_layers=1), tokenizer, folder)
    other_tokenizer = train_tokenizer(["zzz yyy " * 99], TokenizerConfig(vocab_size=270))
    with pytest.raises(UserError, match="another tokenizer"):
        hf.load_initial_weights(one, our_model(), other_tokenizer, folder)


THREE_STEPS = """
import torch, common
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, init_weights, meta_model
def three_steps(d):
    cfg = ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=1024, tie_embeddings=True)
    model = meta_model(cfg)
    common.shard_model(model, d, "float32", compile=False)
    init_weights(model, 0, common.assign)
    optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    rows = torch.randint(1024, (6, 17), generator=torch.Generator().manual_seed(0))
    rows, losses = rows[d.rank::d.world], []
    for _ in range(3):
        hidden, targets = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        loss = linear_cross_entropy(hidden, model.lm_head.weight, targets) / (6 * 16)
        (loss * d.world).backward()
        common.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += d.sum(loss.item())
    plain = meta_model(cfg).to_empty(device="cpu")
    return losses, common.unsharded_copy(model, plain).embed_tokens.weight.detach()
"""
SHARDED = THREE_STEPS + """
import sys, hf
def main():
    d = common.init_distributed("float32")
    steps = three_steps(d)
    if d.is_main:
        torch.save(steps, "steps.pt")
    for folder in map(hf.Path, sys.argv[1:]):
        model = meta_model(hf.config_from_hf(folder))
        common.shard_model(model, d, "float32", compile=False)
        hf.load_initial_weights(d, model, hf.Tokenizer.load(folder / "tokenizer.json"), folder)
        hidden = model(torch.arange(30)[None])
        if d.is_main:
            torch.save((hidden @ model.lm_head.weight.T).detach(), folder / "logits.pt")
    # gloo's threads may still hold the last gathered tensors, and abort if Python leaves meanwhile
    d.wait()
common.cli(main)
"""


def test_loading_into_a_sharded_model(tokenizer, tmp_path):
    """Three processes load one folder into an FSDP model (odd sizes: uneven shards), and train
    another one, with embeddings that are tied and of 1,024 rows, as one process does."""
    shape = SHAPES["odd MHA, narrow heads"]
    models = {tmp_path / str(tied): our_model(shape, tie_embeddings=tied) for tied in (False, True)}
    for folder, model in models.items():
        hf.export(model, tokenizer, folder, torch.float32)
    (tmp_path / "sharded.py").write_text(SHARDED)
    process = warm.start(["sharded.py", *map(str, models)], tmp_path, ranks=3)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    one = common.Dist(0, 1, torch.device("cpu"), None)
    exec(THREE_STEPS, script := {})
    ours, theirs = script["three_steps"](one), torch.load(tmp_path / "steps.pt")
    assert theirs[0] == pytest.approx(ours[0], abs=1e-6)
    torch.testing.assert_close(theirs[1], ours[1], rtol=0, atol=1e-6)
    for folder, model in models.items():
        assert_equal(torch.load(folder / "logits.pt"), logits(model, torch.arange(30)[None]))


def test_command_line(tokenizer, tmp_path):
    checkpoint(tmp_path / "pretrain", our_model(), tokenizer, 3, tmp_path)
    command = [hf.__file__, "pretrain", "export"]
    process = warm.start([*command, "--dtype=float32"], tmp_path)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "parameters in float32" in output, output
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_equal(logits(our_model(), tokens_like(1, 30)), logits(theirs, tokens_like(1, 30)))
    process = warm.start(command, tmp_path)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output.startswith("error: ") and output.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# What a user can get wrong


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = \"yarn\""),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor = 0.5"),
        ({"use_qk_norm": True}, "use_qk_norm = true"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
    ],
    ids=str,
)
def test_what_is_no_plain_llama_is_refused(change, message, tokenizer, tmp_path):
    hf.export(our_model(), tokenizer, tmp_path / "export")
    file = tmp_path / "export/config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path / "export")


def test_forms_of_the_config(tokenizer, tmp_path):
    """As transformers 4 wrote it, with nothing that has a default."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(
                model_type="llama",
                num_hidden_layers=2,
                hidden_size=48,
                intermediate_size=64,
                num_attention_heads=3,
                vocab_size=V,
                rope_theta=5000000,
                rope_scaling=None,
            )
        )
    )
    cfg = hf.config_from_hf(tmp_path)
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.norm_eps, cfg.tie_embeddings) == (
        3,
        16,
        5e6,
        1e-6,
        False,
    )
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert (
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.rope_parameters["rope_theta"],
        theirs.rms_norm_eps,
    ) == (cfg.n_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.norm_eps)


def test_wrong_weights_are_named(tokenizer, tmp_path):
    hf.export(our_model(), tokenizer, tmp_path / "export", torch.float32)
    file = tmp_path / "export/model.safetensors"
    whole, data = load_file(file), file.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(message, tensors=None):
        if tensors is not None:
            save_file(tensors, file)
        with pytest.raises(UserError, match=message) as error:
            hf.load(tmp_path / "export")
        assert "\n" not in str(error.value)

    refused(f"no tensor {name}$", {key: t for key, t in whole.items() if key != name})
    bias = "model.layers.0.self_attn.q_proj.bias"
    refused(f"has not: {bias}", whole | {bias: torch.ones(1)})
    norm = "model.layers.0.self_attn.q_norm.weight"  # no field of Qwen3's config says that it is
    refused(f"has not: {norm}", whole | {norm: torch.ones(12)})
    refused(rf"{name} has the shape \[4, 2\], the config says", whole | {name: torch.ones(4, 2)})
    save_file(
        whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file
    )  # old and harmless
    hf.load(tmp_path / "export")

    file.write_bytes(data[:-10])
    refused("is the download whole")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("is the download whole")
    file.unlink()
    refused("neither model.safetensors nor")
    index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in whole}}
    (tmp_path / "export/model.safetensors.index.json").write_text(json.dumps(index))
    refused("model-00001-of-00002.safetensors")
    (tmp_path / "export/config.json").write_text("{")
    refused("cannot read")


def test_a_tied_head_saved_twice_is_read(tokenizer, tmp_path):
    ours = our_model(tie_embeddings=True)
    hf.export(ours, tokenizer, tmp_path / "export", torch.float32)
    file = tmp_path / "export/model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    model, _ = hf.load(tmp_path / "export")
    assert torch.equal(logits(model, tokens_like(1, 30)), logits(ours, tokens_like(1, 30)))


def test_wrong_paths_are_refused(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nowhere"):
        with pytest.raises(UserError, match="no checkpoint"):
            hf.load(tmp_path / path)
    hf.export(our_model(), tokenizer, tmp_path / "empty")  # an empty folder may be taken
    with pytest.raises(UserError, match="exists"):
        hf.export(our_model(), tokenizer, tmp_path / "empty")
    with pytest.raises(UserError, match="multiple"):
        hf.export(our_model((5, 1, 16, 64, False, 1e4)), tokenizer, tmp_path / "refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]  # nothing half-written is left
    (tmp_path / "empty/tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        hf.load(tmp_path / "empty")


def test_a_tokenizer_too_large_for_the_model_is_refused(tokenizer, tmp_path):
    hf.export(our_model(vocab_size=tokenizer.n_vocab - 1), tokenizer, tmp_path / "export")
    with pytest.raises(UserError, match="ids, the model only"):
        hf.load(tmp_path / "export")


def test_a_failed_export_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError):
        hf.export(our_model(), tokenizer, tmp_path / "export")
    assert not list(tmp_path.iterdir())
