"""Folders from anywhere: no program in them runs, nothing outside of them is read, each fault is
one line."""
import builtins
import copyreg
import dataclasses
import enum
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import common
import dcp_files
import hf
import untrusted
from common import Dist, UserError
from conftest import ROOT
from data.text.tokenizer import TRIAL, Tokenizer, TokenizerConfig, train_tokenizer
from model import ModelConfig, Transformer

ALONE = Dist(0, 1, torch.device("cpu"), None)
CFG = ModelConfig(2, 16, 24, 2, 1, 8, vocab_size=320, max_context=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The same small model as a Hugging Face folder and as a checkpoint of ours."""
    where = tmp_path_factory.mktemp("folders")
    tokenizer = train_tokenizer(["a small text to learn from. " * 20],
                                TokenizerConfig(vocab_size=320))
    model = Transformer(CFG)
    hf.export(model, tokenizer, where / "theirs", torch.float32)
    tokenizer.save(where / "tokenizer.json")
    meta = {"model": dataclasses.asdict(CFG), "tokenizer_ids": tokenizer.ids}
    optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    common.save_checkpoint(ALONE, where / "ours", 7, model, optimizer, meta,
                           where / "tokenizer.json")
    return where


@pytest.fixture
def theirs(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders / "theirs", tmp_path / "theirs"))


@pytest.fixture
def ours(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders / "ours/step_00000007", tmp_path / "ours/step_00000007"))


def refused(folder: Path, seconds: float = 5.0) -> str:
    """What hf.load says of a folder that it must refuse: one short line, soon."""
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        hf.load(folder)
    assert time.process_time() - started < seconds
    said = str(caught.value)
    assert said.isprintable() and len(said) < 1000
    return said


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(folder: Path) -> None:
    """Has meta.json say the sizes and checksums of the files as they are now."""
    files = json.loads((folder / "meta.json").read_text())["files"]
    for name in files:
        data = (folder / name).read_bytes()
        files[name] = [len(data), zlib.crc32(data)]
    change_json(folder / "meta.json", files=files)


class Program:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return builtins.open, (str(self.mark), "w")


# --------------------------------------------------------------------------------------------------
# A checkpoint of ours

@pytest.mark.parametrize("ids", [
    {"eos": [None, None]}, {"eos": ["a", 1]}, {"eos": 3}, {"eos": [True]}, {"bos": 1.0},
    {"opening": [1]}, {"eot": 10**30},
], ids=str)
def test_ids_that_are_none_are_refused(ours, ids):
    """A control token's id is a whole number that the tokenizer has."""
    change_json(ours / "meta.json", tokenizer_ids=ids)
    assert "tokenizer_ids are no control tokens of its tokenizer" in refused(ours)


def test_metadata_is_data(ours, tmp_path):
    mark = tmp_path / "mark"
    (ours / ".metadata").write_bytes(pickle.dumps(Program(mark)))
    pickle.loads((ours / ".metadata").read_bytes()).close()
    assert mark.exists()  # the attack works where nothing stops it
    mark.unlink()
    seal(ours)
    assert "io.open" in refused(ours)
    model = Transformer(CFG)
    with pytest.raises(UserError, match="io.open"):
        common.load_checkpoint(ALONE, ours, model)
    assert not mark.exists()


def test_an_enum_of_any_python(ours):
    """Python 3.11.2 pickles a member of an enum by getattr, which for all else is a program."""
    def dump(found) -> bytes:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        by_getattr = {type(encoding): lambda member: (getattr, found(member))}
        pickler.dispatch_table = copyreg.dispatch_table | by_getattr
        pickler.dump(dcp_files.read_metadata(ours))
        return buffer.getvalue()

    encoding = embedding(dcp_files.read_metadata(ours)).properties.__getstate__()[3]
    assert isinstance(encoding, enum.Enum)
    old = dump(lambda member: (type(member), member.name))
    assert b"getattr" in old
    (ours / ".metadata").write_bytes(old)
    seal(ours)
    common.load_checkpoint(ALONE, ours, Transformer(CFG))
    (ours / ".metadata").write_bytes(dump(lambda member: (dcp_files.Metadata, "__init__")))
    seal(ours)
    assert "__init__: a program in place of data" in refused(ours)


def test_what_is_no_tensor_is_data_too(ours, tmp_path):
    """DCP unpickles freely what .metadata calls no tensor: the weights' own place may say so."""
    mark = tmp_path / "mark"
    whole = dcp_files.read_metadata(ours)
    torch.save(Program(mark), ours / "evil")
    data = next(ours.glob("*.distcp"))
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + (ours / "evil").read_bytes())
    for index, place in list(whole.storage_data.items()):
        if index.fqn in ("model.norm.weight", "optimizer.param_groups.norm.weight.eps"):
            place.offset, place.length = start, (ours / "evil").stat().st_size
            whole.storage_data[dcp_files.MetadataIndex(index.fqn)] = place
    whole.state_dict_metadata["model.norm.weight"] = dcp_files.BytesStorageMetadata()
    (ours / ".metadata").write_bytes(pickle.dumps(whole))
    seal(ours)
    refused(ours)
    with pytest.raises(UserError, match="norm.weight"):
        common.load_checkpoint(ALONE, ours, Transformer(CFG))
    assert not mark.exists()


def test_metadata_takes_no_memory(ours):
    """Numbers of a pickle that its reader would make room for."""
    memo, bytearray8 = b"Nr\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 1 << 34)
    for bomb in (memo, bytearray8):
        (ours / ".metadata").write_bytes(b"\x80\x05" + bomb + b".")
        seal(ours)
        assert ".metadata" in refused(ours, seconds=1.0)


@pytest.mark.parametrize("change, message", [
    (lambda m: setattr(place(m), "relative_path", "../x"), "no name of a file"),
    (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "no name of a file"),
    (lambda m: setattr(place(m), "offset", 1 << 40), "behind the end"),
    (lambda m: setattr(place(m), "length", "x"), "metadata"),
    (lambda m: setattr(embedding(m), "size", torch.Size([1 << 40, 16])), "larger than its files"),
    (lambda m: setattr(embedding(m), "size", torch.Size([320, 8])), r"embed_tokens.weight has the"),
    (lambda m: m.state_dict_metadata.pop("model.norm.weight"), r"norm.weight has the shape \[\]"),
    (lambda m: m.state_dict_metadata.update({"model.norm.weight": 3}), "of no known kind"),
])
def test_metadata_that_lies(ours, change, message):
    metadata = dcp_files.read_metadata(ours)
    change(metadata)
    (ours / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(ours)
    with pytest.raises(UserError, match=message):
        hf.load(ours)


def place(metadata):
    return next(p for i, p in metadata.storage_data.items() if i.fqn == "model.norm.weight")


def embedding(metadata):
    return metadata.state_dict_metadata["model.embed_tokens.weight"]


def test_names_beside_a_runs_checkpoints(ours):
    """What a person has put there is no checkpoint, and stops nothing."""
    for name in ("step_old", "step_00000010.bak", "step_", "step_9.old.old"):
        (ours.parent / name).mkdir()
    assert common.find_checkpoint(ALONE, ours.parent) == ours
    hf.load(ours.parent)


@pytest.mark.parametrize("meta", ["{}", "[1]", "null", "3", '{"files": {}, "step": 7}',
                                  '{"files": [1], "step": 7}', "[" * 100_000])
def test_a_meta_json_of_nothing(ours, meta, capsys):
    (ours / "meta.json").write_text(meta)
    assert common.find_checkpoint(ALONE, ours.parent) is None
    assert "meta.json" in capsys.readouterr().out
    assert "meta.json" in refused(ours)


def test_files_of_a_meta_json_lie_in_its_folder(ours):
    files = json.loads((ours / "meta.json").read_text())["files"]
    os.mkfifo(ours / "pipe")
    for name in ("../ours", "/etc/passwd", "pipe", "", ".", "a\0b"):
        change_json(ours / "meta.json", files=files | {name: [1, 2]})
        assert "damaged" in refused(ours)


# --------------------------------------------------------------------------------------------------
# A Hugging Face folder

def test_weights_lie_in_their_folder(theirs, tmp_path):
    name = "model.safetensors"
    os.rename(theirs / name, tmp_path / name)
    os.mkfifo(theirs / "pipe")
    (theirs / "folder").mkdir()
    index = theirs / f"{name}.index.json"
    for target in (f"../{name}", str(tmp_path / name), "pipe", "folder", 3, None, ["x"], "..", ""):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
        assert "the weights in" in refused(theirs)
    for text in ("[]", '{"weight_map": [1]}', "{}", "[" * 100_000, "{"):
        index.write_text(text)
        assert "the weights in" in refused(theirs)
    index.unlink()
    (theirs / name).symlink_to(tmp_path / name)
    assert "link out of the folder" in refused(theirs)


def test_the_hubs_cache_is_one_folder(theirs, tmp_path):
    """models--a--b/snapshots/<commit>/<name> are links to models--a--b/blobs/<hash>."""
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    for i, file in enumerate(theirs.iterdir()):
        shutil.copy(file, tmp_path / f"models--a--b/blobs/{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    hf.load(snapshot)


BAD_VALUES = [
    ("num_hidden_layers", ["x", None, 2.5, [2], {}, 0, -1, True, 200_000, 9_999, 10**30]),
    ("hidden_size", ["16", 0, -16, 1e400, 1 << 19]),
    ("num_attention_heads", [0, 3, "2"]),
    ("num_key_value_heads", [0, "1", 3]),
    ("head_dim", [0, 7, "8"]),
    ("vocab_size", [0, "x", 10**9, 10**7]),
    ("max_position_embeddings", ["x", -1]),
    ("rms_norm_eps", [float("nan"), -1, 0, "1e-5", [1]]),
    ("rope_theta", [float("nan"), -5, 0, 1e999, "x"]),
    ("tie_word_embeddings", ["false", 0, 1]),
    ("rope_parameters", ["x", [1], 3, {"rope_theta": "x"}, {"rope_theta": -1}]),
    ("quantization_config", [{"x": "\x1b[31m" * 1000}]),
]


@pytest.mark.parametrize("key, values", BAD_VALUES, ids=[key for key, _ in BAD_VALUES])
def test_values_of_a_config_are_checked(theirs, key, values):
    """Nothing is allocated, and no layer built, for a number that the weights do not have."""
    file = theirs / "config.json"
    config = json.loads(file.read_text())
    for value in values:
        changed = config | {key: value}
        if key == "rope_theta":
            changed.pop("rope_parameters")
        file.write_text(json.dumps(changed))
        assert str(theirs) in refused(theirs, seconds=1.0)
    for text in ("[]", "3", "null", "[" * 100_000, '"x"'):
        file.write_text(text)
        assert "config.json" in refused(theirs)


def test_odd_generation_configs(theirs):
    """Ids that are no ids are no ends; what is no object is named."""
    for name in ("generation_config.json", "tokenizer_config.json"):
        file = theirs / name
        for ids in ({"eos_token_id": [[1], {}, None, "x", 1e9]}, {"eos_token": [1]},
                    {"bos_token": {"content": [1]}, "bos_token_id": {}}):
            file.write_text(json.dumps(ids))
            hf.load(theirs)
        file.write_text("[1]")
        assert name in refused(theirs)
        file.unlink()


def test_weights_that_are_no_floats(theirs):
    tensors = {name: torch.zeros(p.shape, dtype=torch.int64)
               for name, p in Transformer(CFG).named_parameters()}
    save_file({hf._hf_name(name): t for name, t in tensors.items()}, theirs / "model.safetensors")
    assert "of the type I64" in refused(theirs)


# --------------------------------------------------------------------------------------------------
# Tokenizers

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
BAD_TOKENIZERS = {
    "an id of 4e9": lambda spec: spec["model"]["vocab"].update({"zz": 4_000_000_000}),
    "a negative id": lambda spec: spec["model"]["vocab"].update({"zz": -1}),
    "an id of text": lambda spec: spec["model"]["vocab"].update({"zz": "1"}),
    "no vocabulary": lambda spec: spec["model"].update(vocab={}, merges=[]),
    "a growing normalizer": lambda spec: spec.update(
        normalizer={"type": "Sequence", "normalizers": [REPLACE] * 3}),
    "a pattern that backtracks": lambda spec: spec.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                       "invert": False}),
    "added tokens of nothing": lambda spec: spec.update(added_tokens=[1, None]),
    "an added token far away": lambda spec: spec["added_tokens"][0].update(id=10**12),
    "a gap that would be filled": lambda spec: spec["added_tokens"][0].update(id=400_000),
    "a token's name that its own pattern backtracks on": lambda spec: spec.update(
        added_tokens=[spec["added_tokens"][0] | {"content": "qz" * 30_000}],
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "[qz]*Q|."}, "behavior": "Isolated",
                       "invert": False}),
    "much memory in little text": lambda spec: spec.update(x=[[]] * 3_000_000 * 10),
}


@pytest.mark.parametrize("change", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_tokenizers_are_refused(folders, tmp_path, change):
    spec = json.loads((folders / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="t.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_tokenizer_that_aborts_is_a_message(folders):
    """Memory that runs out ends Rust's process, not this one."""
    spec = json.loads((folders / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [REPLACE] * 12}
    reason = untrusted.call_apart(TRIAL, json.dumps(spec), 300 << 20, 10)
    assert "ended the process that tried it" in reason
    good = (folders / "tokenizer.json").read_text()
    assert untrusted.call_apart(TRIAL, good, 2 << 30, 10) == ""


def write_script(path, body: str):
    path.write_text(f"def main(text):\n    {body}\n")
    return path


@pytest.mark.parametrize("body, reason", [
    ("pass", ""),
    ("raise ValueError('so\\x1b[2J')", r"so\x1b[2J"),
    ("raise SystemExit", "SystemExit"),
    ("__import__('os')._exit(3)", "exit code 3"),
    ("__import__('os').kill(__import__('os').getpid(), 9)", "exit code -9"),
    ("import tqdm", ""),
    ("import json_of_this_folder", "No module named"),
])
def test_a_process_that_tries(tmp_path, monkeypatch, body, reason):
    """It has the packages that we have, and nothing of the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json_of_this_folder.py").write_text("")
    (tmp_path / "json.py").write_text("raise RuntimeError")
    script = write_script(tmp_path / "näme with spaces.py", body)
    found = untrusted.call_apart(script, "text \udcff", 1 << 30, 5)
    assert reason in found and bool(found) == bool(reason)


def test_a_process_that_tries_where_children_are_not_waited_for(tmp_path):
    """SIGCHLD ignored, as some launchers leave it: every child then seems to have ended well."""
    script = write_script(tmp_path / "bad.py", "raise ValueError('bad')")
    code = ("import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "import untrusted\nfrom pathlib import Path\n"
            f"print(untrusted.call_apart(Path({str(script)!r}), '', 1 << 30, 5))")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert output.stdout == "bad\n"


def test_a_file_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "nowhere"):
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# What is shown

def test_secrets_are_masked():
    hide = untrusted.mask_secrets
    assert hide("at http://me:p@ss@host/v1: no") == "at http://***@host/v1: no"
    assert hide("https://host/v1?api_key=abc&x=1") == "https://host/v1?api_key=***&x=1"
    for plain in ("http://host:8000/v1", "a@b.org", "https://host/@user", "see ://"):
        assert hide(plain) == plain


def test_no_password_is_saved_with_a_checkpoint(folders, tmp_path):
    model = torch.nn.Linear(2, 2)
    meta = {"command": "rl.py --x=http://me:secret@h/v1", "rl": {"url": "http://me:secret@h"}}
    saved = common.save_checkpoint(ALONE, tmp_path, 1, model, torch.optim.SGD(model.parameters()),
                                   meta, folders / "tokenizer.json")
    assert "secret" not in (saved / "meta.json").read_text()
    assert common.read_meta(saved)["rl"] == {"url": "http://***@h"}


def test_a_checkpoint_with_what_looks_like_a_secret_can_be_read(folders, tmp_path):
    """Quotes behind it must not end the JSON; and a chat template stays as its folder has it."""
    model = torch.nn.Linear(2, 2)
    template = {"texts": {"default": '<a href="http://h/?token=abc">'}, "tokens": {}}
    meta = {"rl": {"url": 'at "http://h/?token=abc"'}, "chat_template": template}
    saved = common.save_checkpoint(ALONE, tmp_path, 1, model, torch.optim.SGD(model.parameters()),
                                   meta, folders / "tokenizer.json")
    read = common.read_meta(saved)
    assert read["chat_template"] == template and read["rl"] == {"url": 'at "http://h/?token=***"'}


def test_what_a_server_said_is_printable():
    shown = untrusted.printable("a\x1b[2J\nb\u202e\0" + "c" * 10**7)
    assert shown.startswith("a\\x1b[2J b\\x202e\\x00c") and shown.isprintable()
    assert len(shown) < 250 and shown.endswith("…")
