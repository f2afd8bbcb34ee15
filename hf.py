"""Hugging Face weights, tokenizer and chat template, in and out.

    python hf.py out/tiny/pretrain EXPORT_FOLDER        # then AutoModelForCausalLM.from_pretrained(EXPORT_FOLDER)

Reads any Llama-architecture folder with safetensors (so the released Nanbeige4-3B) and our own checkpoints; writes a
folder that transformers, vLLM and the like take as it is. Our parameters are named as theirs apart from "model.".
"""
import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
from common import UserError
from data.chat.template import CHAT_TEMPLATE
from data.text.tokenizer import Tokenizer
from model import NOT_OF_THE_WEIGHTS, ModelConfig, Transformer, meta_model

SHARD_BYTES = 5e9  # a larger model is written as several files


# ---------------------------------------------------------------------------------------------------------------------
# In

def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of any checkpoint, on one device.

    path: a Hugging Face folder, a phase's folder (out/tiny/pretrain: its newest whole checkpoint) or one checkpoint in
    it. Raises UserError where it is none of these, damaged, or not a plain Llama.
    """
    one = common.Dist(0, 1, torch.device(device), None)
    folder = resolve_checkpoint(one, path)
    model = meta_model(read_model_config(folder)).to(dtype).to_empty(device=device)
    _load_into(one, model, folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model only {model.cfg.vocab_size}")
    return model, tokenizer


def load_initial_weights(d: common.Dist, model: Transformer, tokenizer: Tokenizer, folder: Path) -> float:
    """Copies weights into a model, sharded or not, for a phase to start from; every rank calls it.

    folder: as `resolve_checkpoint` gives it. Returns the base of RoPE that the weights were trained with, which may differ from the
    model's: stages set it. Raises UserError where they have another tokenizer, or another shape than the model.
    """
    theirs = dataclasses.asdict(read_model_config(folder))
    for key, ours in dataclasses.asdict(model.cfg).items():
        if ours != theirs[key] and key not in NOT_OF_THE_WEIGHTS:
            raise UserError(f"{folder} has {key} = {theirs[key]}, this run's model has {ours}: set model.{key}")
    if Tokenizer.load(folder / "tokenizer.json").hash != tokenizer.hash:
        raise UserError(f"{folder} has another tokenizer than this run: set tokenizer.path={folder}/tokenizer.json "
                        "and prepare the data again")
    _load_into(d, model, folder)
    return theirs["rope_theta"]


def load_frozen(d: common.Dist, folder: Path, dtype: str) -> Transformer:
    """A model that is not trained, its weights in dtype and sharded like the trained one; every rank calls it."""
    model = meta_model(read_model_config(folder)).to(getattr(torch, dtype)).requires_grad_(False)
    common.shard_model(model, d, dtype, compile=False)
    _load_into(d, model, folder)
    return model


def resolve_checkpoint(d: common.Dist, source: str | Path, out: Path = Path(".")) -> Path:
    """A Hugging Face folder as it is, or the checkpoint that a path of ours means: a phase of this run (a folder in
    `out`), or any phase's folder or checkpoint. UserError where it is none of these."""
    path = out / source if (out / source).is_dir() else Path(source)
    if (path / "config.json").is_file() or (path / "meta.json").is_file():
        return path
    folder = common.find_checkpoint(d, path)
    if folder is None:
        raise UserError(f"{path} is no checkpoint: neither a phase's folder like out/tiny/pretrain nor a Hugging Face "
                        "folder (with config.json; `hf download NAME --local-dir FOLDER` gets one)")
    return folder


def read_model_config(folder: Path) -> ModelConfig:
    if (folder / "config.json").is_file():
        return config_from_hf(folder)
    values = common.read_meta(folder).get("model", {}) | {"kernels": "auto"}  # this machine may not be that one
    return common.from_dict(ModelConfig, values, f"{folder / 'meta.json'}: model")


def _load_into(d: common.Dist, model: Transformer, folder: Path) -> None:
    if (folder / "config.json").is_file():
        load_weights(model, folder)
    else:
        common.load_checkpoint(d, folder, model)


def config_from_hf(folder: Path) -> ModelConfig:
    """ModelConfig of a folder's config.json, with transformers' defaults for what it does not say.

    Raises UserError for anything that would compute something else than our model.
    """
    file = Path(folder) / "config.json"
    try:
        hf = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    # transformers 5 writes rope_parameters; before it rope_theta stood alone and rope_scaling held the rest
    rope = (hf.get("rope_parameters") or {}) | (hf.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    supported = {
        "model_type": (hf.get("model_type"), "llama"),
        "architectures": (hf.get("architectures") or ["LlamaForCausalLM"], ["LlamaForCausalLM"]),
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "attention_bias": (hf.get("attention_bias", False), False),
        "mlp_bias": (hf.get("mlp_bias", False), False),
        "rope_type": (rope_type, "default"),
        "quantization_config": (hf.get("quantization_config"), None),
    }
    for key, (value, ours) in supported.items():
        if value != ours:
            raise UserError(f"{file}: {key} = {json.dumps(value)} is not supported, only {json.dumps(ours)} "
                            "(a plain Llama)")
    try:
        heads = hf["num_attention_heads"]
        return ModelConfig(
            n_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], ffn_size=hf["intermediate_size"],
            n_heads=heads, n_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads, vocab_size=hf["vocab_size"],
            tie_embeddings=hf.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            max_context=hf.get("max_position_embeddings", 2048), norm_eps=hf.get("rms_norm_eps", 1e-6),
            init_std=hf.get("initializer_range", 0.02))
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing") from None


def load_weights(model: Transformer, folder: Path, assign=common.assign) -> None:
    """Copies a folder's safetensors (one file, or several with an index) into a model, one tensor at a time.

    `assign(parameter, full_tensor)` puts each into place, sharded or not, in the parameter's type. Raises UserError
    for files that are absent or broken, and names tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}")
    try:
        names = {single.name} if single.is_file() else set(json.loads(index.read_text())["weight_map"].values())
        found = {}  # tensor name -> the open file that holds it
        for file in sorted(names):
            weights = safe_open(folder / file, framework="pt")
            found |= {name: weights for name in weights.keys()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the weights in {folder}: {error}; is the download whole?") from error
    # A tied lm_head may be there as a second copy; frequencies were saved by transformers long ago.
    ours = {_hf_name(name): parameter for name, parameter in model.named_parameters()}
    spare = {name for name in found if name.endswith("rotary_emb.inv_freq")} | (
        {"lm_head.weight"} if model.cfg.tie_embeddings else set())
    _refuse(folder, "has no tensor", ours.keys() - found.keys())
    _refuse(folder, "has a tensor that a plain Llama of this config has not:", found.keys() - ours.keys() - spare)
    for name, parameter in ours.items():
        shape = found[name].get_slice(name).get_shape()
        if shape != list(parameter.shape):
            raise UserError(f"{folder}: {name} has the shape {shape}, the config says {list(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in ours.items():
            assign(parameter, found[name].get_tensor(name))


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else "model." + name


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{folder} {what} {', '.join(sorted(names)[:3])}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# Out

def export(model: Transformer, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a Hugging Face folder, whole or not at all; it must not exist yet (or be empty).

    model: a plain module (common.unsharded_copy). dtype: of the saved weights. Raises UserError where the folder is in use
    or transformers would refuse the model.
    """
    folder, cfg = Path(folder), model.cfg
    _must_be_free(folder)
    if cfg.hidden_size % cfg.n_heads:
        raise UserError(f"transformers refuses a Llama whose hidden_size ({cfg.hidden_size}) is not a multiple of its "
                        f"{cfg.n_heads} heads; choose model.n_heads so that it is")
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir(parents=True)
    try:
        _save_weights(model, aside, dtype)
        for name, content in _json_files(model, tokenizer, dtype).items():
            common.write_atomic(aside / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _must_be_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; remove it, or name another folder to export to")


def _save_weights(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or numbered files and their index where they are more than SHARD_BYTES."""
    shards, size = [[]], 0
    for name, parameter in model.named_parameters():  # a tied lm_head comes once, as the embedding
        n_bytes = parameter.numel() * dtype.itemsize
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((_hf_name(name), parameter))
        size += n_bytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards):
        tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file makes it private
    if len(shards) > 1:
        total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        weight_map = {name: file for file, shard in zip(files, shards) for name, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        common.write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _json_files(model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, dict]:
    """The configs and the tokenizer. RoPE's base and the type are said twice: as transformers 5 and as 4 read them."""
    cfg, name_of = model.cfg, {i: name for name, i in tokenizer.special.items()}
    turn_end = tokenizer.special.get("<|im_end|>", tokenizer.eot)
    is_chat = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys()
    type_name = str(dtype).removeprefix("torch.")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": turn_end, "pad_token_id": tokenizer.eot}
    return {
        "config.json": ids | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "num_hidden_layers": cfg.n_layers, "hidden_size": cfg.hidden_size, "intermediate_size": cfg.ffn_size,
            "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim,
            "vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.max_context, "rms_norm_eps": cfg.norm_eps,
            "rope_theta": model.rope_theta,
            "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": cfg.tie_embeddings, "initializer_range": cfg.init_std,
            "attention_bias": False, "mlp_bias": False, "dtype": type_name, "torch_dtype": type_name},
        # the report's decoding; a base model ends with <|endoftext|>, a chat turn with <|im_end|>
        "generation_config.json": ids | {"eos_token_id": sorted({turn_end, tokenizer.eot}), "do_sample": True,
                                         "temperature": 0.6, "top_p": 0.95},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name_of[tokenizer.bos],
            "eos_token": name_of[turn_end], "pad_token": name_of[tokenizer.eot], "model_max_length": cfg.max_context,
            "clean_up_tokenization_spaces": False} | ({"chat_template": CHAT_TEMPLATE} if is_chat else {}),
        "tokenizer.json": _tokenizer_json(tokenizer)}


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Our file, told to begin plain texts with the bos token, as in pre-training. Chat templates are exempt from it."""
    spec = json.loads(tokenizer.json)
    if spec.get("post_processor") is None:
        bos = next(name for name, i in tokenizer.special.items() if i == tokenizer.bos)
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        spec["post_processor"] = {
            "type": "TemplateProcessing", "single": [begin, a], "pair": [begin, a, b],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}}}
    return spec


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a phase's folder, a checkpoint in it, or a Hugging Face folder")
    parser.add_argument("folder", help="the folder to write; it must not exist yet")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    _must_be_free(Path(args.folder))  # before the long work
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load(args.checkpoint, dtype=dtype)
    export(model, tokenizer, args.folder, dtype)
    print(f"wrote {args.folder}: {sum(p.numel() for p in model.parameters()):,} parameters in {args.dtype}")


if __name__ == "__main__":
    common.cli(main)
