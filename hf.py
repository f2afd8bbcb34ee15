"""Hugging Face weights, tokenizer and chat template, in and out.

    python hf.py out/tiny/pretrain EXPORT_FOLDER    # for AutoModelForCausalLM.from_pretrained

Reads any Llama-architecture folder with safetensors (so the released Nanbeige4.1-3B) and our own
checkpoints; writes a folder that transformers, vLLM and the like take as it is. Our parameters are
named as theirs apart from "model.".
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
from common import Dist, UserError
from data.chat.template import CHAT_TEMPLATE
from data.text.tokenizer import EOT, Tokenizer, TokenizerConfig, fill_gaps
from model import NOT_OF_THE_WEIGHTS, ModelConfig, Transformer, meta_model

SHARD_BYTES = 5e9  # a larger model is written as several files


# --------------------------------------------------------------------------------------------------
# In

def load(path: str | Path, device="cpu",
         dtype: torch.dtype = torch.float32,
         checked: bool = False) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of any checkpoint, on one device. No collective: one rank may call it.

    path: a Hugging Face folder, a phase's folder (out/tiny/pretrain: its newest whole checkpoint)
    or one checkpoint in it. checked: the path is what resolve_checkpoint has returned, for which
    all ranks have read the files together. Raises UserError where it is none of these, damaged, or
    not a plain Llama.
    """
    one_process = Dist(0, 1, torch.device(device), None)
    folder = Path(path) if checked else resolve_checkpoint(one_process, path)
    model = meta_model(read_model_config(folder)).to(dtype).to_empty(device=device)
    _load_weights(one_process, model, folder, checked=True)
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, "
                        f"the model only {model.cfg.vocab_size}")
    return model, tokenizer


def load_initial_weights(dist: Dist, model: Transformer, tokenizer: Tokenizer,
                         folder: Path) -> float:
    """Copies weights into a model, sharded or not, for a phase to start from.

    Every rank calls it. folder: as `resolve_checkpoint` returns it. Returns the base of RoPE that
    the weights were trained with, which may differ from the model's: stages set it. Raises
    UserError where an id of their tokenizer means something else here, or where they have another
    shape than the model.
    """
    theirs = dataclasses.asdict(read_model_config(folder))
    for key, ours in dataclasses.asdict(model.cfg).items():
        if ours != theirs[key] and key not in NOT_OF_THE_WEIGHTS:
            raise UserError(f"{folder} has {key} = {theirs[key]}, "
                            f"this run's model has {ours}: set model.{key}")
    their_tokenizer = load_tokenizer(folder)
    difference = tokenizer.disagreement(their_tokenizer)
    if difference:
        raise UserError(f"{folder} has another tokenizer than this run ({difference}): "
                        f"set tokenizer.path={folder}/tokenizer.json and prepare the data again")
    if dist.is_main and their_tokenizer.eot != tokenizer.eot:
        ends = [tokenizer.pieces[i].decode() for i in (their_tokenizer.eot, tokenizer.eot)]
        print(f"note: documents of {folder} end with {ends[0]}, of this run with {ends[1]}; "
              f"tokenizer.eot={ends[0]} goes on as they did")
    _load_weights(dist, model, folder)
    return theirs["rope_theta"]


def load_frozen(dist: Dist, folder: Path, dtype: str) -> Transformer:
    """A model that is not trained, its weights in dtype and sharded like the trained one's.

    Every rank calls it.
    """
    model = meta_model(read_model_config(folder))
    model = model.to(getattr(torch, dtype)).requires_grad_(False)
    common.shard_model(model, dist, dtype, compile=False)
    _load_weights(dist, model, folder)
    return model


def resolve_checkpoint(dist: Dist, source: str | Path, out: Path = Path(".")) -> Path:
    """The folder of the checkpoint that a path means; UserError where it means none, or a damaged
    one.

    A Hugging Face folder is one as it is; of ours it may be a phase of this run (a folder in
    `out`), or any phase's folder or checkpoint.
    """
    path = out / source if (out / source).is_dir() else Path(source)
    if (path / "config.json").is_file():
        return path
    if (path / "meta.json").is_file():
        if problem := common.find_damage(dist, path):
            raise UserError(f"cannot load a damaged checkpoint: {problem}")
        return path
    folder = common.find_checkpoint(dist, path)
    if folder is None:
        raise UserError(f"{path} is no checkpoint: neither a phase's folder like out/tiny/pretrain "
                        "nor a Hugging Face folder (with config.json; "
                        "`hf download NAME --local-dir FOLDER` gets one)")
    return folder


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint was trained here: its folder is one of ours, or an export of one."""
    if not (folder / "config.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and _read_json(path).get("chat_template") == CHAT_TEMPLATE


def read_model_config(folder: Path) -> ModelConfig:
    """The model's shape, of a Hugging Face folder or a checkpoint of ours."""
    if (folder / "config.json").is_file():
        return config_from_hf(folder)
    values = common.read_meta(folder).get("model", {})
    values |= {"kernels": "auto"}  # this machine may not be that one
    return common.from_dict(ModelConfig, values, f"{folder / 'meta.json'}: model")


def _load_weights(dist: Dist, model: Transformer, folder: Path, checked: bool = False) -> None:
    if (folder / "config.json").is_file():
        load_safetensors(model, folder)
    else:
        common.load_checkpoint(dist, folder, model, checked=checked)


def load_tokenizer(folder: Path, cfg: TokenizerConfig | None = None) -> Tokenizer:
    """A checkpoint's tokenizer, with the document start and ends that its own files say.

    cfg: of a run that goes on from it. The file at cfg.path is taken in place of the checkpoint's,
    which may lack a phase's control tokens; UserError where they give an id to different tokens.
    cfg.eot ends documents, whatever the checkpoint's do.
    """
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if cfg and cfg.path:
        own = tokenizer
        tokenizer = Tokenizer.load(cfg.path)
        difference = tokenizer.disagreement(own)
        if difference:
            raise UserError(f"the weights in {folder} cannot go on with tokenizer.path={cfg.path}: "
                            f"{difference}")
    if (folder / "config.json").is_file():
        tokenizer.take_ids(**_ids_from_hf(folder, tokenizer))
    elif (folder / "meta.json").is_file():
        tokenizer.take_ids(**common.read_meta(folder).get("tokenizer_ids", {}))
    if cfg and cfg.eot:
        tokenizer.take_eot(cfg.eot)
    return tokenizer


def _ids_from_hf(folder: Path, tokenizer: Tokenizer) -> dict:
    """Tokenizer.take_ids' arguments, from a folder's configs: of the model, generation, tokenizer.

    Each may say what begins and ends a text, by one id, several, or a name. Ids that are no control
    tokens are left out: transformers writes 1 and 2 where nobody has chosen any.
    """
    bos, eos = [], []
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = folder / name
        config = _read_json(path) if path.is_file() else {}
        bos += _control_ids(config, "bos_token", tokenizer)
        eos += _control_ids(config, "eos_token", tokenizer)
    document_ends = [tokenizer.special[name] for name in EOT if tokenizer.special.get(name) in eos]
    return {
        "bos": next(iter(bos), None),
        "eot": next(iter(document_ends), None),
        "eos": set(eos),
    }


def _control_ids(config: dict, key: str, tokenizer: Tokenizer) -> list[int]:
    """The control tokens that a config names under a key, or whose ids it has under key + "_id"."""
    name = config.get(key)
    if isinstance(name, dict):  # an AddedToken
        name = name.get("content")
    ids = config.get(key + "_id")
    if not isinstance(ids, list):
        ids = [ids]
    known = tokenizer.special.values()
    return [i for i in [tokenizer.special.get(name), *ids] if i in known]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def config_from_hf(folder: Path) -> ModelConfig:
    """ModelConfig of a folder's config.json, with transformers' defaults for what it does not say.

    Raises UserError for anything that would compute something else than our model.
    """
    file = Path(folder) / "config.json"
    config = _read_json(file)
    # transformers 5 writes rope_parameters; 4 wrote rope_theta, and rope_scaling for the rest
    rope = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    _check_plain_llama(file, config, rope)
    try:
        n_heads = config["num_attention_heads"]
        hidden_size = config["hidden_size"]
        return ModelConfig(
            n_layers=config["num_hidden_layers"],
            hidden_size=hidden_size,
            ffn_size=config["intermediate_size"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            head_dim=config.get("head_dim") or hidden_size // n_heads,
            vocab_size=config["vocab_size"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            max_context=config.get("max_position_embeddings", 2048),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            init_std=config.get("initializer_range", 0.02))
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing") from None


def _check_plain_llama(file: Path, config: dict, rope: dict) -> None:
    """Raises UserError for a config of what is no plain Llama."""
    values = {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or ["LlamaForCausalLM"],
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "quantization_config": config.get("quantization_config"),
    }
    supported = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_type": "default",
        "quantization_config": None,
    }
    for key, value in values.items():
        if value != supported[key]:
            raise UserError(f"{file}: {key} = {json.dumps(value)} is not supported, "
                            f"only {json.dumps(supported[key])} (a plain Llama)")


def load_safetensors(model: Transformer, folder: Path, assign=common.assign) -> None:
    """Copies a folder's safetensors into a model, one tensor at a time.

    They are one file, or several with an index. `assign(parameter, full_tensor)` puts each tensor
    into place, sharded or not, in the parameter's type. Raises UserError for files that are absent
    or broken, and names tensors that are missing, unknown or of another shape.
    """
    files = _open_safetensors(Path(folder))
    parameters = {_hf_name(name): parameter for name, parameter in model.named_parameters()}
    _refuse(folder, "has no tensor", parameters.keys() - files.keys())

    # Frequencies were saved by transformers long ago; a tied lm_head may be there as a second copy.
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if model.cfg.tie_embeddings:
        ignored.add("lm_head.weight")
    unknown = files.keys() - parameters.keys() - ignored
    _refuse(folder, "has a tensor that a plain Llama of this config has not:", unknown)

    for name, parameter in parameters.items():
        shape = files[name].get_slice(name).get_shape()
        if shape != list(parameter.shape):
            raise UserError(f"{folder}: {name} has the shape {shape}, "
                            f"the config says {list(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            assign(parameter, files[name].get_tensor(name))


def _open_safetensors(folder: Path) -> dict:
    """{tensor's name: the open file that holds it}"""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}")
    files = {}
    try:
        if single.is_file():
            names = {single.name}
        else:
            names = set(json.loads(index.read_text())["weight_map"].values())
        for name in sorted(names):
            file = safe_open(folder / name, framework="pt")
            files |= dict.fromkeys(file.keys(), file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the weights in {folder}: {error}; "
                        "is the download whole?") from error
    return files


def _hf_name(name: str) -> str:
    """Hugging Face's name of a parameter of ours."""
    return name if name.startswith("lm_head") else "model." + name


def _refuse(folder: Path, what: str, names: set[str]) -> None:
    """Raises UserError that shows the first of the names, where there are any."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"{folder} {what} {', '.join(sorted(names)[:3])}{more}")


# --------------------------------------------------------------------------------------------------
# Out

def export(model: Transformer, tokenizer: Tokenizer, folder: str | Path,
           dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a Hugging Face folder, whole or not at all; it must not exist yet (or be empty).

    model: a plain module (common.unsharded_copy). dtype: of the saved weights. Raises UserError
    where the folder is in use or transformers would refuse the model.
    """
    folder = Path(folder)
    _check_is_free(folder)
    cfg = model.cfg
    if cfg.hidden_size % cfg.n_heads:
        raise UserError(f"transformers refuses a Llama whose hidden_size ({cfg.hidden_size}) is "
                        f"not a multiple of its {cfg.n_heads} heads; "
                        "choose model.n_heads so that it is")
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir(parents=True)
    try:
        _save_weights(model, aside, dtype)
        for name, content in _json_files(model, tokenizer, dtype).items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            common.write_atomic(aside / name, text)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_is_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; remove it, or name another folder to export to")


def _save_weights(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or numbered files and their index where they are more than SHARD_BYTES."""
    shards = _split_into_shards(model, dtype)
    if len(shards) == 1:
        file_names = ["model.safetensors"]
    else:
        numbers = range(1, len(shards) + 1)
        file_names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in numbers]
    weight_map = {}
    for file_name, shard in zip(file_names, shards):
        tensors = {}
        for name, parameter in shard:
            tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
            weight_map[name] = file_name
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)  # save_file makes it private
    if len(shards) > 1:
        n_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        common.write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _split_into_shards(model: Transformer, dtype: torch.dtype) -> list[list[tuple]]:
    """(Hugging Face's name, parameter) of all parameters, in shards of at most SHARD_BYTES each.

    A larger parameter has a shard of its own.
    """
    shards, size = [[]], 0
    for name, parameter in model.named_parameters():  # a tied lm_head comes once, as the embedding
        n_bytes = parameter.numel() * dtype.itemsize
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((_hf_name(name), parameter))
        size += n_bytes
    return shards


def _json_files(model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, dict]:
    """{file name: content} of the configs and the tokenizer."""
    turn_end = tokenizer.special.get("<|im_end|>", tokenizer.eot)
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": turn_end,
        "pad_token_id": tokenizer.eot,
    }
    # the report's decoding; a base model ends with <|endoftext|>, a chat turn with <|im_end|>
    generation_config = ids | {
        "eos_token_id": sorted({turn_end, tokenizer.eot, *tokenizer.eos}),
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    return {
        "config.json": ids | _config_json(model, dtype),
        "generation_config.json": generation_config,
        "tokenizer_config.json": _tokenizer_config_json(tokenizer, turn_end, model.cfg.max_context),
        "tokenizer.json": _tokenizer_json(tokenizer),
    }


def _config_json(model: Transformer, dtype: torch.dtype) -> dict:
    """RoPE's base and the type are written twice: as transformers 5 and as 4 read them."""
    cfg = model.cfg
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_size,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_context,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def _tokenizer_config_json(tokenizer: Tokenizer, turn_end: int, max_context: int) -> dict:
    """With the chat template where the tokenizer is made for chats."""
    names = {i: name for name, i in tokenizer.special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos],
        "eos_token": names[turn_end],
        "pad_token": names[tokenizer.eot],
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
    }
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        config["chat_template"] = CHAT_TEMPLATE
    return config


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Our file, in which other programs find the ids and control tokens that we have trained with.

    No id is behind a gap, and control tokens are found before a text is normalized: else <think>
    after a line break would be three tokens in a Llama vocabulary. Plain texts begin with the bos
    token of our training, whatever the file said; chat templates are exempt from it.
    """
    spec = fill_gaps(json.loads(tokenizer.json))
    spec["added_tokens"] = [token | {"normalized": False} if token["content"] in tokenizer.special
                            else token for token in spec["added_tokens"]]
    bos = next(name for name, i in tokenizer.special.items() if i == tokenizer.bos)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }
    return spec


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="a phase's folder, a checkpoint in it, or a Hugging Face folder")
    parser.add_argument("folder", help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    _check_is_free(Path(args.folder))  # before the long work
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load(args.checkpoint, dtype=dtype)
    export(model, tokenizer, args.folder, dtype)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {args.folder}: {n_parameters:,} parameters in {args.dtype}")


if __name__ == "__main__":
    common.cli(main)
