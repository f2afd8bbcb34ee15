"""checks/nanbeige.py on a small model with a tokenizer like the released one."""
import json
import sys

import pytest

import hf
from checks import nanbeige
from data.text.test_tokenizer import released_like
from data.text.tokenizer import Tokenizer
from model import ModelConfig, Transformer, init_weights


def check(monkeypatch, folder) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["nanbeige.py", str(folder)])
    with pytest.raises(SystemExit) as left:
        nanbeige.main()
    return int(left.value.code)


def test_all_parts_but_the_slow_tokenizer(tmp_path, monkeypatch, capsys):
    """And it says so where something differs."""
    model = Transformer(ModelConfig(1, 16, 24, 2, 1, 8, vocab_size=1024, init_std=0.3))
    init_weights(model, 0)
    folder = tmp_path / "released"
    hf.export(model, Tokenizer(released_like()), folder)
    (folder / "tokenizer.json").write_text(released_like())
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (
        "<|im_start|>system\n{% if tools %}{{ messages }}{% elif messages[0].role != 'system' %}"
        + nanbeige.template.RELEASED_SYSTEM
        + "<|im_end|>\n{% else %}{{ messages[0].content }}<|im_end|>\n{% endif %}"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    path.write_text(json.dumps(config))
    assert check(monkeypatch, folder) == 1
    lines = capsys.readouterr().out.splitlines()
    equal = [line for line in lines if "equal" in line]
    different = [line for line in equal if line.split()[-4] != line.split()[-2]]
    assert len(equal) == 12 and "slow tokenizer: skipped: no --slow" in lines
    # the template above knows no tools
    assert all(line.startswith("chat template") and "3 of" in line for line in different)
    assert len(different) == 2

    path.unlink()
    assert check(monkeypatch, folder) == 0
    monkeypatch.setattr(nanbeige, "meant", lambda text, tokenizer: tokenizer.encode(text))
    assert check(monkeypatch, folder) == 1
