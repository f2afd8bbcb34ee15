"""Hugging Face weights, tokenizer and chat template, in and out.

    python hf.py out/tiny/pretrain EXPORT_FOLDER    # for AutoModelForCausalLM.from_pretrained

Reads any Llama-architecture folder with safetensors (so the released Nanbeige4.1-3B) and our own
checkpoints; writes a folder that transformers, vLLM and the like take as it is. Our parameters are
named as theirs apart from "model.".
"""
from settings import from_dict

import argparse
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
import untrusted
from common import Dist, UserError
from data.chat.template import CHAT_TEMPLATE
from data.text.tokenizer import EOT, Tokenizer, TokenizerConfig, fill_gaps
from model import NOT_OF_THE_WEIGHTS, ModelConfig, Transformer, meta_model

CONFIGS = ("tokenizer_config.json", "generation_config.json", "config.json")
SHARD_BYTES = 5e9  # a larger model is written as several files
MOST_TEMPLATE = 1 << 20  # bytes of a chat template
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights may be saved as, in safetensors' words


# --------------------------------------------------------------------------------------------------
# Weights, in

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
    model = _model_without_weights(folder).to(dtype).to_empty(device=device)
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
        if key not in NOT_OF_THE_WEIGHTS and not _is_same(ours, theirs[key]):
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
    _load_weights(dist, model, folder, checked=True)  # resolve_checkpoint has read the files
    return theirs["rope_theta"]


def _is_same(ours, theirs) -> bool:
    """Whether two settings of a model are equal; numbers in fp32, as converted folders have it."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def load_frozen(dist: Dist, folder: Path, dtype: str) -> Transformer:
    """A model that is not trained, its weights in dtype and sharded like the trained one's.

    Every rank calls it.
    """
    model = _model_without_weights(folder)
    model = model.to(getattr(torch, dtype)).requires_grad_(False)
    common.shard_model(model, dist, dtype, compile=False)
    _load_weights(dist, model, folder)
    return model


def resolve_checkpoint(
        dist: Dist, source: str | Path, out: Path = Path("."), init_from: str = "") -> Path:
    """The folder of the checkpoint that a path means; UserError where it means none, or a damaged
    one.

    A Hugging Face folder is one as it is; of ours it may be a phase of this run (a folder in
    `out`), any phase's folder or checkpoint, or else a phase of the run that `init_from` is of.
    """
    path = out / source if (out / source).is_dir() else Path(source)
    if init_from and not path.is_dir():
        elsewhere = run_of_checkpoint(Path(init_from)) / source
        if elsewhere.is_dir():
            path = elsewhere
            if dist.is_main:
                print(f"note: {source} is {path}: {out} has none")
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


def run_of_checkpoint(path: Path) -> Path:
    """The folder of the run that a phase's folder, or a checkpoint in one, is of."""
    return path.parent.parent if path.name.startswith("step_") else path.parent


def _model_without_weights(folder: Path) -> Transformer:
    """A folder's model on the meta device.

    UserError where its config says another shape than its weights have: a config alone must not
    decide what is allocated.
    """
    cfg = read_model_config(folder)
    if (folder / "config.json").is_file():
        _check_shapes(folder, cfg, _open_safetensors(folder))
    else:
        import dcp_files  # only where a checkpoint is read

        try:
            tensors = dcp_files.read_metadata(folder).state_dict_metadata
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {folder}: {untrusted.printable(str(error))}") from error
        for name, shape in _shapes(cfg):
            found = [*getattr(tensors.get(f"model.{name}"), "size", ())]
            if found != shape:
                raise UserError(f"{folder}: {name} has the shape {found}, meta.json says {shape}")
    return meta_model(cfg)


def _shapes(cfg: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of each parameter, one by one: a false number of layers costs nothing."""
    one_layer = meta_model(dataclasses.replace(cfg, n_layers=1))
    for name, parameter in one_layer.named_parameters():
        n_copies = cfg.n_layers if name.startswith("layers.") else 1
        for layer in range(n_copies):
            yield name.replace("layers.0.", f"layers.{layer}."), list(parameter.shape)


def _load_weights(dist: Dist, model: Transformer, folder: Path, checked: bool = False) -> None:
    if (folder / "config.json").is_file():
        load_safetensors(model, folder)
    else:
        common.load_checkpoint(dist, folder, model, checked=checked)


def load_safetensors(model: Transformer, folder: Path, assign=common.assign) -> None:
    """Copies a folder's safetensors into a model, one tensor at a time.

    They are one file, or several with an index. `assign(parameter, full_tensor)` puts each tensor
    into place, sharded or not, in the parameter's type. Raises UserError for files that are absent
    or broken, and names tensors that are missing, unknown or of another shape.
    """
    files = _open_safetensors(Path(folder))
    _check_shapes(folder, model.cfg, files)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assign(parameter, files[_hf_name(name)].get_tensor(_hf_name(name)))


def _check_shapes(folder: Path, cfg: ModelConfig, files: dict) -> None:
    """UserError for tensors that are missing, unknown, of another shape or no floats.

    files: as _open_safetensors gives. Only the files' headers are read.
    """
    known, missing = set(), []
    for name, shape in _shapes(cfg):
        name = _hf_name(name)
        known.add(name)
        if name not in files:
            missing.append(name)
            if len(missing) > 3:
                break
            continue
        tensor = files[name].get_slice(name)
        if tensor.get_shape() != shape:
            raise UserError(f"{folder}: {name} has the shape {tensor.get_shape()}, "
                            f"the config says {shape}")
        if tensor.get_dtype() not in FLOATS:
            raise UserError(f"{folder}: {name} is of the type {tensor.get_dtype()}, none of "
                            f"{', '.join(FLOATS)}")
    _refuse(folder, "has no tensor", missing)

    # Frequencies were saved by transformers long ago; a tied lm_head may be there as a second copy.
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if cfg.tie_embeddings:
        ignored.add("lm_head.weight")
    unknown = sorted(files.keys() - known - ignored)
    _refuse(folder, "has a tensor that a plain Llama of this config has not:", unknown)


def _open_safetensors(folder: Path) -> dict:
    """{tensor's name: the open file that holds it}"""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not single.exists() and not index.exists():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}")
    files = {}
    try:
        if single.exists():
            names = {single.name}
        else:
            weight_map = untrusted.read_json(folder, index.name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index.name} has no weight_map")
            names = {str(name) for name in weight_map.values()}
        for name in sorted(names):
            file = safe_open(untrusted.file_inside(folder, name), framework="pt")
            files |= dict.fromkeys(file.keys(), file)
    except (OSError, SafetensorError, ValueError) as error:
        reason = untrusted.printable(str(error))
        raise UserError(f"cannot read the weights in {folder}: {reason}; "
                        "is the download whole?") from error
    return files


def _hf_name(name: str) -> str:
    """Hugging Face's name of a parameter of ours."""
    return name if name.startswith("lm_head") else "model." + name


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    """Raises UserError that shows the first of the names, where there are any."""
    if names:
        more = " and more" if len(names) > 3 else ""
        raise UserError(f"{folder} {what} {untrusted.printable(', '.join(names[:3]))}{more}")


# --------------------------------------------------------------------------------------------------
# Tokenizer and chat template, in

def load_tokenizer(folder: Path, cfg: TokenizerConfig | None = None) -> Tokenizer:
    """A checkpoint's tokenizer, with the document start and ends, and the chat template, that its
    own files say.

    cfg: of a run that goes on from it. The file at cfg.path is taken in place of the checkpoint's,
    which may lack a phase's control tokens; UserError where they give an id to different tokens.
    cfg.eot ends documents, whatever the checkpoint's do.
    """
    file = folder / "tokenizer.json"
    if file.exists():
        _inside(folder, file.name)
    tokenizer = Tokenizer.load(file)
    if cfg and cfg.path:
        own = tokenizer
        tokenizer = Tokenizer.load(cfg.path)
        difference = tokenizer.disagreement(own)
        if difference:
            raise UserError(f"the weights in {folder} cannot go on with tokenizer.path={cfg.path}: "
                            f"{difference}")
    in_our_form = cfg is not None and cfg.chat_template == "ours"
    if (folder / "config.json").is_file():
        tokenizer.take_ids(**_ids_from_hf(folder, tokenizer))
        tokenizer.opening = _opening_from_hf(folder, tokenizer)
        tokenizer.chat_template = None if in_our_form else _template_from_hf(folder)
    elif (folder / "meta.json").is_file():
        meta = common.read_meta(folder)
        ids = _ids_from_meta(meta, folder, tokenizer)
        tokenizer.take_ids(ids.get("bos"), ids.get("eot"), ids.get("eos", []))
        tokenizer.opening = ids.get("opening", tokenizer.opening)  # None: texts begin with nothing
        tokenizer.chat_template = None if in_our_form else _template_from_meta(meta, folder)
    if cfg and cfg.eot:
        tokenizer.take_eot(cfg.eot)
    return tokenizer


def _template_from_meta(meta: dict, folder: Path):
    """The chat template of another's that a checkpoint of ours goes on with."""
    kept = meta.get("chat_template")
    if kept is None:
        return None
    file = folder / "meta.json"
    if not isinstance(kept, dict):
        raise UserError(f"{file}: chat_template is no object")
    return _checked_template(kept.get("texts"), kept.get("tokens"), file)


def _template_from_hf(folder: Path):
    """A folder's own chat template; None where it has none, or ours."""
    texts, file = _template_texts(folder)
    if texts is None or texts == {"default": CHAT_TEMPLATE}:
        return None
    names = ("special_tokens_map.json", "tokenizer_config.json")
    configs = [_read_json(folder, name) for name in names]
    from data.chat import foreign  # Jinja: only others' checkpoints need it

    return _checked_template(texts, foreign.tokens_of(*configs), folder / file)


def _template_texts(folder: Path) -> tuple[dict | None, str]:
    """A folder's chat templates by name, and the file.

    As in transformers a file of its own goes before tokenizer_config.json, where it may be one or a
    list of several. What stands in additional_chat_templates/ is not read: see notes_on.
    """
    if (folder / "chat_template.jinja").exists():
        try:
            data = untrusted.read_bytes(_inside(folder, "chat_template.jinja"), MOST_TEMPLATE)
            return {"default": data.decode()}, "chat_template.jinja"
        except (OSError, ValueError) as error:
            reason = untrusted.printable(str(error))
            raise UserError(f"cannot read {folder / 'chat_template.jinja'}: {reason}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder, name).get("chat_template")
        if isinstance(found, list) and all(isinstance(one, dict) for one in found):
            found = {str(one.get("name")): one.get("template") for one in found}
        if found is not None:
            return found if isinstance(found, dict) else {"default": found}, name
    return None, ""


def _checked_template(texts, tokens, file: Path):
    """A foreign.ChatTemplate; UserError for what is none."""
    from data.chat import foreign

    of_names = isinstance(texts, dict) and isinstance(texts.get("default"), str)
    of_tokens = isinstance(tokens, dict) and tokens.keys() <= {*foreign.TOKENS}
    if not of_names or not of_tokens:
        raise UserError(f"{file}: chat_template must be a text, or several by name, one of them "
                        "\"default\"")
    for value in (*texts.values(), *tokens.values()):
        if not isinstance(value, str) or len(value) > MOST_TEMPLATE:
            raise UserError(f"{file}: chat_template must be of texts of at most "
                            f"{MOST_TEMPLATE >> 20} MB")
    reason = foreign.try_templates(json.dumps(dict(texts=texts, tokens=tokens)))
    if reason:
        raise UserError(f"the chat template {file} cannot be used: {reason} "
                        "(tokenizer.chat_template=ours does without it)")
    return foreign.ChatTemplate(texts, tokens, str(file))


def _ids_from_meta(meta: dict, folder: Path, tokenizer: Tokenizer) -> dict:
    """Tokenizer.ids, as a checkpoint of ours keeps them; UserError for what are none."""
    ids = meta.get("tokenizer_ids", {})
    eos = ids.get("eos", [])
    said = [ids[name] for name in ("bos", "opening", "eot") if ids.get(name) is not None]
    said += eos if isinstance(eos, list) else ["eos"]
    known = tokenizer.special.values()
    if not all(type(i) is int and i in known for i in said):
        raise UserError(f"{folder / 'meta.json'}: tokenizer_ids are no control tokens of its "
                        "tokenizer")
    return ids


def _ids_from_hf(folder: Path, tokenizer: Tokenizer) -> dict:
    """Tokenizer.take_ids' arguments, from a folder's configs: of the model, generation, tokenizer.

    Each may say what begins and ends a text, by one id, several, or a name. Ids that are no control
    tokens are left out: transformers writes 1 and 2 where nobody has chosen any.
    """
    bos, eos = [], []
    for name in CONFIGS:
        config = _read_json(folder, name)
        bos += _control_ids(config, "bos_token", tokenizer)
        eos += _control_ids(config, "eos_token", tokenizer)
    document_ends = [tokenizer.special[name] for name in EOT if tokenizer.special.get(name) in eos]
    return {
        "bos": next(iter(bos), None),
        "eot": next(iter(document_ends), None),
        "eos": set(eos),
    }


def _opening_from_hf(folder: Path, tokenizer: Tokenizer) -> int | None:
    """What a folder's tokenizer puts before a text: as its tokenizer.json says; where that is
    silent, bos if tokenizer_config.json wants it."""
    if tokenizer.first != -1:
        return tokenizer.first
    wants_bos = _read_json(folder, "tokenizer_config.json").get("add_bos_token") is True
    return tokenizer.bos if wants_bos else None


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint was trained here: its folder is one of ours, or an export of one."""
    if not (folder / "config.json").is_file():
        return True
    texts, _ = _template_texts(folder)
    return texts == {"default": CHAT_TEMPLATE}


def notes_on(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """What a user should know of how another's folder is served, a line each; none of ours."""
    if is_ours(folder):
        return []
    template = tokenizer.chat_template
    texts, file = _template_texts(folder)
    if template:
        lines = [f"chats have the form of the checkpoint's own template, {template.where}"]
    elif texts:
        lines = [f"chats have our own form, ChatML, and not that of {folder / file}"]
    else:
        lines = [f"{folder} has no chat template: chats have our own form, ChatML"]
    if (folder / "additional_chat_templates").is_dir():
        lines.append(f"{folder / 'additional_chat_templates'} is not read: chats with tools have "
                     "the form of all others")
    names = {i: name for name, i in tokenizer.special.items()}
    ends = {}
    for name in CONFIGS:
        ids = _control_ids(_read_json(folder, name), "eos_token", tokenizer)
        if ids:
            ends[name] = sorted({names[i] for i in ids})
    if len(set(map(tuple, ends.values()))) > 1:
        said = "; ".join(f"{untrusted.printable(' '.join(found))} in {name}"
                         for name, found in ends.items())
        lines.append(f"{folder} names different ends of an answer ({said}): each of them ends one")
    return lines


# Of a generation_config.json: bounds of what sampling here does; and what it does not, with the
# value at which that changes nothing.
SAMPLING = {"temperature": (0, 1e3), "top_p": (1e-6, 1), "top_k": (0, 1 << 24)}
NO_SAMPLING = {"min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
               "num_beams": 1}


def sampling_defaults(folder: Path) -> tuple[dict[str, float], list[str]]:
    """What a folder's generation_config.json says of temperature, top_p and top_k; and what it says
    that is not done here, as "name = value"."""
    said = _read_json(folder, "generation_config.json")
    defaults, undone = {}, []
    for name, (least, most) in SAMPLING.items():
        value = said.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not least <= value <= most:
            shown = untrusted.printable(json.dumps(value))
            raise UserError(f"{folder / 'generation_config.json'}: {name} = {shown} must be a "
                            f"number from {least:g} to {most:g}")
        defaults[name] = int(value) if name == "top_k" else value
    if said.get("do_sample") is False:
        defaults["temperature"] = 0.0
    for name, neutral in NO_SAMPLING.items():
        if said.get(name) not in (None, neutral):
            undone.append(f"{name} = {untrusted.printable(json.dumps(said[name]), 60)}")
    return defaults, undone


def _control_ids(config: dict, key: str, tokenizer: Tokenizer) -> list[int]:
    """The control tokens that a config names under a key, or whose ids it has under key + "_id"."""
    name = config.get(key)
    if isinstance(name, dict):  # an AddedToken
        name = name.get("content")
    ids = config.get(key + "_id")
    if not isinstance(ids, list):
        ids = [ids]
    if isinstance(name, str):
        ids = [tokenizer.special.get(name), *ids]
    known = tokenizer.special.values()
    return [i for i in ids if type(i) is int and i in known]


def _inside(folder: Path, name: str) -> Path:
    """untrusted.file_inside, with UserError."""
    try:
        return untrusted.file_inside(folder, name)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {untrusted.printable(str(error))}") from error


def _read_json(folder: Path, name: str) -> dict:
    """A JSON object of a folder's file; {} where there is no such file."""
    if not (folder / name).exists():
        return {}
    try:
        return untrusted.read_json(folder, name)
    except (OSError, ValueError) as error:
        reason = untrusted.printable(str(error))
        raise UserError(f"cannot read {folder / name}: {reason}") from error


# --------------------------------------------------------------------------------------------------
# The model's shape, in

# A config's numbers in our and in their words, and the most that each may be: far above every
# model, and so small that no product of them overflows.
HF_NAMES = {
    "n_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
MOST = {
    "n_layers": 10_000,
    "hidden_size": 1 << 20,
    "ffn_size": 1 << 24,
    "n_heads": 1 << 16,
    "n_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_context": 1 << 40,
    "rope_theta": 1e15,
    "norm_eps": 1.0,
    "init_std": 1e3,
}


def read_model_config(folder: Path) -> ModelConfig:
    """The model's shape, of a Hugging Face folder or a checkpoint of ours."""
    if (folder / "config.json").is_file():
        return config_from_hf(folder)
    values = common.read_meta(folder).get("model", {})
    values |= {"kernels": "auto"}  # this machine may not be that one
    cfg = from_dict(ModelConfig, values, f"{folder / 'meta.json'}: model")
    own_names = {name: name for name in HF_NAMES}
    _check_values(folder / "meta.json", dataclasses.asdict(cfg), own_names)
    return cfg


def config_from_hf(folder: Path) -> ModelConfig:
    """ModelConfig of a folder's config.json, with transformers' defaults for what it does not say.

    Raises UserError for anything that would compute something else than our model.
    """
    file = Path(folder) / "config.json"
    config = _read_json(Path(folder), file.name)
    # transformers 5 writes rope_parameters; 4 wrote rope_theta, and rope_scaling for the rest
    parts = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{file}: rope_parameters and rope_scaling must be objects")
    rope = parts[0] | parts[1]
    _check_plain_llama(file, config, rope)
    given = {ours: config[theirs] for ours, theirs in HF_NAMES.items()
             if config.get(theirs) is not None}
    if rope.get("rope_theta") is not None:
        given["rope_theta"] = rope["rope_theta"]
    defaults = {"tie_embeddings": False, "rope_theta": 10000.0, "max_context": 2048,
                "norm_eps": 1e-6, "init_std": 0.02}
    values = defaults | given
    for ours in ("n_layers", "hidden_size", "ffn_size", "n_heads", "vocab_size"):
        if ours not in values:
            raise UserError(f"{file}: {HF_NAMES[ours]} is missing")
    values.setdefault("n_kv_heads", values["n_heads"])
    if "head_dim" not in values:
        _check_values(file, values, HF_NAMES)  # before these two are divided
        values["head_dim"] = values["hidden_size"] // values["n_heads"]
    _check_values(file, values, HF_NAMES)
    return from_dict(ModelConfig, values, str(file))


def _check_values(file: Path, values: dict, names: dict[str, str]) -> None:
    """UserError for a value of another type, or one that no model has; names: as the file says."""
    for key, value in values.items():
        if key not in names:
            continue
        said = f"{file}: {names[key]} = {untrusted.printable(json.dumps(value))}"
        if key == "tie_embeddings":
            if type(value) is not bool:
                raise UserError(f"{said} must be true or false")
        elif key in ("rope_theta", "norm_eps", "init_std"):
            is_number = type(value) in (int, float) and 0 <= value <= MOST[key]  # nan is none
            if not is_number or (value == 0 and key != "init_std"):
                raise UserError(f"{said} must be a number above 0 and at most {MOST[key]:g}")
        elif type(value) is not int or not 1 <= value <= MOST[key]:
            raise UserError(f"{said} must be a whole number from 1 to {MOST[key]:,}")
    if values["n_heads"] % values["n_kv_heads"]:
        raise UserError(f"{file}: {values['n_heads']} heads are no multiple of "
                        f"{values['n_kv_heads']} key/value heads")
    if values.get("head_dim", 2) % 2:
        raise UserError(f"{file}: head_dim = {values['head_dim']} must be even, for RoPE")


# What other models' configs set, and the value at which it would change nothing: there may be no
# tensor of it whose name would tell.
OF_OTHERS = {
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "no_rope_layers": None,
    "sliding_window": None,
    "layer_types": None,
    "attention_out_bias": False,
    "use_bias": False,
    "qkv_bias": False,
    "bias": False,
    "use_qk_norm": False,
    "qk_norm": False,
    "qk_layernorm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "scale_emb": 1.0,
    "num_local_experts": None,
    "num_experts": None,
}


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
    for key, neutral in OF_OTHERS.items():
        for part in (config, rope):
            if part.get(key) is not None:
                values[key], supported[key] = part[key], neutral
    for key, value in values.items():
        if value != supported[key]:
            said = untrusted.printable(json.dumps(value))
            raise UserError(f"{file}: {key} = {said} is not supported, "
                            f"only {json.dumps(supported[key])} (a plain Llama)")


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


def untie(model: Transformer) -> Transformer:
    """The model with an lm_head of its own, which is the embedding where that is tied to it.

    For servers whose weights are reloaded: vLLM 0.32 on a CPU goes on with the old lm_head where it
    is tied (checks/vllm.py).
    """
    untied = meta_model(dataclasses.replace(model.cfg, tie_embeddings=False))
    state = model.state_dict()
    if model.cfg.tie_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    untied.load_state_dict(state, assign=True)
    untied.rope_theta = model.rope_theta
    return untied.requires_grad_(False)


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
    """With the chat template that it was trained with, where it is made for chats."""
    names = {i: name for name, i in tokenizer.special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos],
        "eos_token": names[turn_end],
        "pad_token": names[tokenizer.eot],
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
    }
    template = tokenizer.chat_template
    if template:
        texts = [{"name": name, "template": text} for name, text in template.texts.items()]
        config |= template.tokens
        config["chat_template"] = texts if len(texts) > 1 else template.texts["default"]
    elif {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        config["chat_template"] = CHAT_TEMPLATE
    return config


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Our file, in which other programs find the ids and control tokens that we have trained with.

    No id is behind a gap, and control tokens are found before a text is normalized: else <think>
    after a line break would be three tokens in a Llama vocabulary. Plain texts begin as those of
    our training, whatever the file said; chat templates are exempt from it.
    """
    spec = fill_gaps(json.loads(tokenizer.json))
    for token in spec["added_tokens"]:
        if token["content"] in tokenizer.special:
            token["normalized"] = False
    begin, special_tokens = [], {}
    for name, i in tokenizer.special.items():
        if i == tokenizer.opening:
            begin = [{"SpecialToken": {"id": name, "type_id": 0}}]
            special_tokens = {name: {"id": name, "ids": [i], "tokens": [name]}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, second],
        "special_tokens": special_tokens,
    }
    return spec


def read_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="a phase's folder, a checkpoint in it, or a Hugging Face folder")
    parser.add_argument("folder", help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--untie", action="store_true",
                        help="write the lm_head, too, where it is the embedding: for servers that "
                             "get new weights")
    return parser.parse_args()


def main():
    args = read_options()
    _check_is_free(Path(args.folder))  # before the long work
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load(args.checkpoint, dtype=dtype)
    export(untie(model) if args.untie else model, tokenizer, args.folder, dtype)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {args.folder}: {n_parameters:,} parameters in {args.dtype}")


if __name__ == "__main__":
    common.cli(main)
