"""checks.nanbeige on a folder like those that Nanbeige released."""

import json
import sys

import pytest

import hf
from checks import nanbeige
from data.text.test_tokenizer import released_like
from data.text.tokenizer import Tokenizer
from test_hf import our_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    spec = json.loads(released_like())
    merges = spec["model"]["merges"]  # without those that make a control token of its text
    spec["model"]["merges"] = [pair for pair in merges if "".join(pair) not in ("<s>", "</s>")]
    hf.export(our_model(vocab_size=1024), Tokenizer(json.dumps(spec)), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").unlink()  # its template is ours, not the released one
    (tmp_path / "model.safetensors").unlink()      # in bfloat16 random weights have near ties
    monkeypatch.setattr(sys, "argv", ["checks.nanbeige", str(tmp_path)])


def test_a_folder_that_is_read_rightly(folder, capsys):
    with pytest.raises(SystemExit) as left:
        nanbeige.main()
    output = capsys.readouterr().out
    assert left.value.code == 0, output
    assert "ids of the file: 906 of 906 equal" in output
    assert "fast, loses <think>, </think>" in output
    assert "export, control tokens as such: 50 of 50 equal" in output
    assert "SFT's preparation of 100 conversations: 100 of 100 equal" in output
    assert "slow tokenizer: skipped" in output and "chat template: skipped" in output


def test_ids_that_differ_are_shown(folder, capsys, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text)[:9])
    with pytest.raises(SystemExit) as left:
        nanbeige.main()
    output = capsys.readouterr().out
    assert left.value.code == 1
    assert "ids of the file: 906 of 906 equal" in output
    assert "fast, control tokens as text: 45 of 45 equal" not in output
