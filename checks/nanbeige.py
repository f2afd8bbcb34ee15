"""Do our ids and prompts of a released Nanbeige model equal those of other programs?

    python -m checks.nanbeige Nanbeige4.1-3B --slow=old/bin/python
    python -m checks.nanbeige Nanbeige4-3B-Base --path=Nanbeige4.1-3B/tokenizer.json

The folders are what `hf download Nanbeige/NAME --local-dir NAME` gets; their tokenizer files are
enough. What needs a file that is not there is skipped, with a line. --path: tokenizer.path of a run
that goes on from these weights. --slow: a Python with the slow tokenizer, in an environment of its
own (`python -m venv old && old/bin/pip install "transformers<5" sentencepiece protobuf`). It reads
FOLDER/tokenizer.model, or where there is none a SentencePiece model made of tokenizer.json, whose
scores are the order of the merges.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import common
import hf
from common import UserError
from data.chat import conversations, template
from data.text.tokenizer import MARKUP, Tokenizer, TokenizerConfig

TEXTS = [
    "Hello, world!",
    " two  spaces   and a tab\t.",
    "",
    " ",
    "\n\n\n",
    "a\r\nb\r\n",
    "The quick brown fox jumps over the lazy dog.",
    "don't WE'LL it's o'clock",
    "x" * 300,
    "3.14159 2,718,281 1e-9 0xFF 2^{10} ١٢٣ ½ Ⅷ",
    "naïve café, Grüße, Привет, мир! Ελλάδα",
    "你好，世界。",
    "中华人民共和国的首都是哪里？请用一句话回答。",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "他说：“我们明天在看准科技见面。”",
    "BOSS直聘是一款招聘软件，南北阁由它研发。",
    "数学题：3×4＋5＝17，对吗？",
    "繁體中文：臺灣的夜市很熱鬧。",
    "全角ＡＢＣ１２３！？、半角abc123!?,",
    "中英mixed文本with数字2024年。",
    "𠮷野家で𩸽を食べる",
    "こんにちは、世界。カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "שלום עולם",
    "🙂",
    "👩‍👩‍👧‍👦 family, 🇨🇳 flag, 👍🏽 skin tone",
    "emoji🙂inside🎉words",
    "zero\u200bwidth\u00a0space\u3000wide",
    "\0\x01\x7f control \ufeff and \ufffd",
    "e\u0301 is not \u00e9",
    "▁ already ▁▁ there",
    "def f(x):\n    return x + 1  # 数学\n",
    "for i in range(10):\n\tprint(i, end='\\n')\n",
    "#include <vector>\nint main() { std::vector<int> v{1, 2}; return v[0] << 3; }",
    "SELECT * FROM t WHERE a <> 'b' -- comment",
    "{\"name\": \"add\", \"arguments\": {\"a\": 1}}",
    "\\frac{a}{b} \\leq \\sum_{i=1}^{n} x_i^2 \\therefore \\boxed{42}",
    "<html><b>bold</b></html>",
    "a<0x41>b",
    "<unk> <s>in a text</s>",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    "before<|endoftext|>after",
    "\n<think>\n12 + 30\n= 42\n</think>\n\n42.",
    "x<think>y</think>z",
    " <think> 嗯，让我想想。 </think> 好。",
    "<think></think>",
    "<|im_start|>assistant\n<think>\nso\n</think>\n\n"
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call><|im_end|>\n",
    "<think <|im_end| > </thin>k",
]

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

SLOW = '''
import json, sys
from pathlib import Path
from sentencepiece import sentencepiece_model_pb2 as sp
from transformers import AddedToken, LlamaTokenizer
folder, spec_file, questions = map(Path, sys.argv[1:])
spec, model_file = json.loads(spec_file.read_text()), folder / "tokenizer.model"
if not model_file.is_file():
    vocab, rank = spec["model"]["vocab"], {}
    for i, merge in enumerate(spec["model"]["merges"]):
        piece = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        rank.setdefault(piece, i)
    model = sp.ModelProto()
    for piece, i in sorted(vocab.items(), key=lambda item: item[1]):
        kind = {0: "UNKNOWN", 1: "CONTROL", 2: "CONTROL"}.get(i, "NORMAL")
        if piece.startswith("<0x"):
            kind = "BYTE"
        score = -float(rank.get(piece, 10**6 + i))
        model.pieces.add(piece=piece, score=score, type=getattr(sp.ModelProto.SentencePiece, kind))
    model.trainer_spec.model_type = sp.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    model_file = questions.with_suffix(".model")
    model_file.write_bytes(model.SerializeToString())
added = {}
for token in spec["added_tokens"]:
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added[token["id"]] = AddedToken(token["content"], **{key: token[key] for key in keys})
slow = LlamaTokenizer(str(model_file), legacy=True, add_bos_token=False,
                      added_tokens_decoder=added)
answers = {"written": [], "meant": []}
for text in json.loads(questions.read_text()):
    answers["written"].append(slow.encode(text, split_special_tokens=True))
    answers["meant"].append(slow.encode(text))
questions.write_text(json.dumps(answers))
'''


def meant(text: str, tokenizer: Tokenizer) -> list[int]:
    """Our ids of a text in which the names of control tokens mean these."""
    names = "|".join(map(re.escape, tokenizer.special))
    ids = []
    for part in re.split(f"({names})", text):
        if part in tokenizer.special:
            ids.append(tokenizer.special[part])
        elif part:
            ids += tokenizer.encode(part)
    return ids


def mentions(text: str, names: list[str]) -> bool:
    """Whether one of these control tokens is written in a text."""
    return any(name in text for name in names)


class Report:
    """Prints a line for each comparison, and remembers whether all were equal."""

    def __init__(self):
        self.is_equal = True

    def compare(self, what: str, ours: list, theirs: list) -> None:
        different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        print(f"{what}: {len(ours) - len(different)} of {len(ours)} equal")
        for i in different[:3]:
            print(f"    {i}: ours   {ours[i]!r:.200}\n       theirs {theirs[i]!r:.200}")
        self.is_equal &= not different

    def skip(self, what: str, why: str) -> None:
        print(f"{what}: skipped: {why}")


def check_file(report: Report, tokenizer: Tokenizer, spec: dict) -> None:
    """Every piece and every added token has the id that the file gives it."""
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    wanted, found = [], []
    for name, i in (spec["model"]["vocab"] | added).items():
        byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
        wanted.append((i, bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()))
        found.append((i, tokenizer.pieces[i]))
    report.compare("ids of the file", found, wanted)
    control = {name: i for name, i in added.items() if name in tokenizer.special}
    report.compare("its control tokens", [tokenizer.special], [control])


def check_fast(report: Report, tokenizer: Tokenizer, fast, what: str) -> None:
    """fast: transformers' tokenizer, of the released file or of our export.

    It has no way to keep as text what is not marked special, as MARKUP. Of a released file it loses
    control tokens: those behind a gap have other ids, and those that are looked for in the
    normalized text (as "▁<think>") are found after a space alone.
    """
    texts = [text for text in TEXTS if not mentions(text, MARKUP)]
    ours = [tokenizer.encode(text) for text in texts]
    theirs = [fast.encode(text, add_special_tokens=False, split_special_tokens=True)
              for text in texts]
    report.compare(f"{what}, control tokens as text", ours, theirs)
    lost = []
    for i, token in fast.added_tokens_decoder.items():
        if token.normalized or tokenizer.special.get(token.content) != i:
            lost.append(token.content)
    if lost:
        print(f"{what}, loses {', '.join(lost)}")
    texts = [text for text in TEXTS if not mentions(text, lost)]
    ours = [meant(text, tokenizer) for text in texts]
    theirs = [fast.encode(text, add_special_tokens=False) for text in texts]
    report.compare(f"{what}, control tokens as such", ours, theirs)


def check_export(report: Report, tokenizer: Tokenizer, folder: Path) -> None:
    """What hf.export writes of the tokenizer, read by transformers."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(hf._tokenizer_json(tokenizer)))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    check_fast(report, tokenizer, fast, "export")
    names = list(tokenizer.special)
    ids = fast.convert_tokens_to_ids(names)
    report.compare("export, ids of control tokens", list(tokenizer.special.values()), ids)


def check_slow(report: Report, tokenizer: Tokenizer, source: Path, file: Path, python: str,
               folder: Path) -> None:
    """The slow tokenizer: SentencePiece between the control tokens."""
    if not python:
        return report.skip("slow tokenizer", "no --slow")
    is_made = not (source / "tokenizer.model").is_file()
    what = "slow tokenizer" + " of a tokenizer.model made of tokenizer.json" * is_made
    (folder / "slow.py").write_text(SLOW)
    questions = folder / "texts.json"
    questions.write_text(json.dumps(TEXTS))
    subprocess.run([python, folder / "slow.py", source, file, questions], check=True)
    answers = json.loads(questions.read_text())
    ours = [tokenizer.encode(text) for text in TEXTS]
    report.compare(f"{what}, control tokens as text", ours, answers["written"])
    ours = [meant(text, tokenizer) for text in TEXTS]
    report.compare(f"{what}, control tokens as such", ours, answers["meant"])


def check_sft(report: Report, tokenizer: Tokenizer, folder: Path) -> None:
    """SFT's preparation of 100 conversations with thoughts; each must decode to what was said."""
    chats = []
    for i in range(100):
        question, thoughts, answer = (TEXTS[n % len(TEXTS)] for n in (i, i + 1, 7 * i))
        said = {"role": "assistant", "reasoning": f"{i}: {thoughts}.", "content": f"So {answer}"}
        chats.append([{"role": "user", "content": f"{question} {i}?"}, said])
    lines = [json.dumps({"messages": messages}) for messages in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    try:
        pool = conversations.prepare(
            folder / "data", "chats", [{"path": str(folder / "chats.jsonl")}], tokenizer)
    except UserError as error:
        return report.skip("SFT's preparation", f"{error} (--path names one that has it)")
    ours = [pool.conversation(i)[0].tolist() for i in range(len(pool.ends))]
    wanted = [template.render(messages, tokenizer) for messages in chats]
    report.compare("SFT's preparation of 100 conversations", ours, wanted)
    think, close = (tokenizer.special[name] for name in ("<think>", "</think>"))
    counts = [(ids.count(think), ids.count(close)) for ids in ours]
    report.compare("… thoughts between two control tokens", counts, [(1, 1)] * len(chats))


def check_template(report: Report, tokenizer: Tokenizer, source: Path) -> None:
    """The released chat template, and what our render makes of the same conversations."""
    theirs = None
    if (source / "tokenizer_config.json").is_file():
        theirs = AutoTokenizer.from_pretrained(source)
    if theirs is None or not theirs.chat_template:
        return report.skip("chat template", "no chat_template in the folder")
    ask = {"role": "user", "content": "3×4 等于多少？"}
    answer = {"role": "assistant", "content": "12。"}
    system = {"role": "system", "content": "Be brief."}
    add = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    thoughts = {"reasoning": "add", "reasoning_content": "add"}  # our name and theirs
    call = {"role": "assistant", "content": "", "tool_calls": [add]} | thoughts
    result = {"role": "tool", "content": "12"}
    cases = [([ask], ()), ([system, ask], ()), ([ask, answer, ask], ()), ([ask], TOOLS),
             ([system, ask, answer, ask], TOOLS), ([ask, call, result], TOOLS)]
    texts, ids = [[], []], [[], []]
    for messages, tools in cases:
        settings = {"tools": list(tools) or None, "add_generation_prompt": True}
        ours = template.render(messages, tokenizer, True, tools, system="released")
        text = theirs.apply_chat_template(messages, tokenize=False, **settings)
        texts[0].append(ours)
        texts[1].append(meant(text, tokenizer))
        if not mentions(text, MARKUP):
            ids[0].append(ours)
            ids[1].append(theirs.apply_chat_template(messages, return_dict=False, **settings))
    report.compare("chat template, its text in our ids", *texts)
    report.compare("chat template, ids of a fast tokenizer without think tags", *ids)


@torch.no_grad()
def check_weights(report: Report, source: Path) -> None:
    """Logits of one prompt, in bfloat16, on this CPU."""
    if not list(source.glob("*.safetensors")):
        return report.skip("weights", f"no .safetensors in {source}")
    model, tokenizer = hf.load(source, dtype=torch.bfloat16)
    prompt = tokenizer.encode_prompt("The capital of Norway is")
    tokens = torch.tensor([prompt])
    ours = (model(tokens) @ model.lm_head.weight.T).float()
    del model
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    theirs = theirs(tokens).logits.float()
    difference = (ours - theirs).abs().mean() / theirs.abs().mean()
    print(f"weights: logits differ by {difference:.4f} of their mean size (bfloat16)")
    report.compare("weights, likeliest tokens", ours.argmax(-1).tolist(),
                   theirs.argmax(-1).tolist())
    report.is_equal &= bool(difference < 0.02)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--path", default="", help="another tokenizer.json to go on with")
    parser.add_argument("--slow", default="", help="a Python with transformers<5, sentencepiece")
    args = parser.parse_args()
    report, source = Report(), args.folder
    cfg = TokenizerConfig(path=args.path, chat_template="ours")  # it is held against theirs
    tokenizer = hf.load_tokenizer(source, cfg)
    file = Path(args.path or source / "tokenizer.json")
    names = {i: name for name, i in tokenizer.special.items()}
    print(f"{file}: {tokenizer.n_vocab:,} ids; documents begin with {names[tokenizer.bos]} and end "
          f"with {names[tokenizer.eot]}; answers with "
          f"{', '.join(names[i] for i in tokenizer.stop_ids)}")
    check_file(report, tokenizer, json.loads(file.read_text()))
    check_fast(report, tokenizer, PreTrainedTokenizerFast(tokenizer_file=str(file)), "fast")
    with tempfile.TemporaryDirectory() as folder:
        check_export(report, tokenizer, Path(folder))
        check_slow(report, tokenizer, source, file, args.slow, Path(folder))
        check_sft(report, tokenizer, Path(folder))
    check_template(report, tokenizer, source)
    check_weights(report, source)
    sys.exit(not report.is_equal)


if __name__ == "__main__":
    common.cli(main)
