"""Public data sets as task families: `problems(split, n, seed)`, `reward(problem, response)`.

    gsm8k          by name, from the Hugging Face hub
    gsm8k=PATH     rows of the same form in a .jsonl, .json or .parquet file, or .gz of one, or a
                   folder of such

By name, "test" is the official test split, and "dev" a tenth of the official training split, which
"train" goes without. A set that has no test split is cut in three, one that has nothing else gives
only "test". A PATH gives all its rows for any split, but for `synthetic`, whose rows say in which
they are, and `constraints`, which takes any prompts. A hash of the problem's text decides, so that
one which two sets share is on one side in both.

Rows that are no problems (empty, malformed, an answer that cannot be read, a problem that was there
before) are left out, and counted on stderr.
"""
import functools
import glob
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from common import UserError
from data.chat.template import after_thoughts
from data.sets import bfcl, constraints, ifeval, livecodebench, programs, synthetic
from data.tasks.problem import (
    GENERATED,
    OpenAnswer,
    Problem,
    assign_split,
    seeded_rng,
    shuffled,
)
from data.text import sources
from data.verify import answers

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
# so many known problems in a row, and no fewer than are known: the set repeats itself
REPEATS = 10_000


# ---- mathematics: a record to a problem. KeyError for a missing column, ValueError for what else
# makes it unusable

def read_column(record: dict, *columns: str) -> str:
    """The text of the first of these columns that the record has."""
    column = next((column for column in columns if column in record), None)
    if column is None:
        raise KeyError(columns[0])
    value = record[column]
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f"empty {column}")
    return text


def math_problem(raw: str, answer: str, steps: tuple[str, ...] = (), level: int = 0, **extra
                 ) -> Problem:
    question = raw + INSTRUCTION
    extra["reply"] = "\\boxed{{}}"
    extra["prompt"] = f"Problem: {question}\nWork:"     # also where the work is not known
    return Problem("", raw, question, steps, answer, level, extra)


def gsm8k(record: dict) -> Problem:
    """The gold stands after '####'.

    The work before it has calculator marks, <<1+2=3>>, which nobody needs.
    """
    question = read_column(record, "question")
    solution = read_column(record, "answer")
    work, mark, gold = solution.rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("answer without ####")
    lines = re.sub(r"<<[^<>\n]*+>>", "", work).splitlines()
    steps = tuple(line.strip() for line in lines if line.strip())
    return math_problem(question, gold.replace(",", "").strip(), steps)


def hendrycks_math(record: dict) -> Problem:
    """MATH (arXiv 2103.03874) and MATH-500.

    The gold is the solution's last box where no column has it.
    """
    problem = read_column(record, "problem")
    solution = read_column(record, "solution")
    answer = read_column(record, "answer") if "answer" in record else answers.boxed(solution)
    if not answer:
        raise ValueError("solution without a box")
    level = re.search(r"\d", str(record.get("level")))
    return math_problem(problem, answer, (solution,), int(level[0]) if level else 0)


def aime(record: dict) -> Problem:
    answer = read_column(record, "answer", "Answer", "expected_answer")
    if not re.fullmatch(r"[0-9]{1,3}", answer):
        raise ValueError("answer is no number of three digits")
    problem = read_column(record, "problem", "Problem", "question")
    return math_problem(problem, str(int(answer)))      # "073" is 73


def dapo(record: dict) -> Problem:
    """DAPO-Math-17k (arXiv 2503.14476), or open-r1's copy of it.

    In the first an instruction stands around the problem.
    """
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        prompt = prompt[0]["content"]
    prompt = re.sub(r"^Solve the following math problem step by step\..*?\n\n", "", prompt,
                    flags=re.DOTALL)
    prompt = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*$", "",
                    prompt)
    gold = record if "solution" in record else record["reward_model"]
    problem = read_column({"prompt": prompt}, "prompt")
    return math_problem(problem, read_column(gold, "solution", "ground_truth"))


def bigmath(record: dict) -> Problem:
    """Big-Math (arXiv 2502.17387); solve_rate: of Llama-3.1-8B, 0 to 1, None where unknown."""
    return math_problem(read_column(record, "problem"), read_column(record, "answer"),
                        solve_rate=record.get("llama8b_solve_rate"))


def gpqa(record: dict) -> Problem:
    """GPQA (arXiv 2311.12022).

    The question decides the order of its choices, so that it is the same in every run.
    """
    question = read_column(record, "Question")
    right = read_column(record, "Correct Answer")
    wrong = [read_column(record, f"Incorrect Answer {i}") for i in (1, 2, 3)]
    choices = shuffled(seeded_rng("gpqa", question), [right, *wrong])
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
    answer = "ABCD"[choices.index(right)]
    return math_problem(f"{question}\n\n{listed}\n\nYour answer is one letter.", answer)


def cut_next_problem(response: str) -> str:
    """A base model that runs on into a next problem is judged on its own."""
    thoughts, end, text = response.rpartition("</think>")
    return thoughts + end + re.sub(r"(\nAnswer:.*)\nProblem:[\s\S]*", r"\1", text)


def math_reward(problem: Problem, response: str) -> float | None:
    return answers.reward(problem.answer, cut_next_problem(response))


def math_judge(problem: Problem, response: str) -> float | None | OpenAnswer:
    """As math_reward, or the answer that rules and math-verify leave open."""
    return answers.judge(problem.answer, cut_next_problem(response))


def math_answer(response: str) -> str | None:
    """The answer that a response offers; None for none."""
    return answers.final_answer(cut_next_problem(response))


def same_math(answer: str, other: str) -> bool:
    """Whether two answers are equal by plain rules alone."""
    return answers.equal(answer, other) is True


# ---- requests that no rule judges: for comparisons

def request(record: dict) -> Problem:
    """HelpSteer3 (context: messages), UltraFeedback and the like (prompt: text or messages).

    Of one turn alone.
    """
    prompt = record["context"] if "context" in record else record["prompt"]
    if not isinstance(prompt, str):
        if [message["role"] for message in prompt] != ["user"]:
            raise ValueError("several turns")
        prompt = prompt[0]["content"]
    return Problem("", read_column({"prompt": prompt}, "prompt"), prompt, (), "", 0, {})


def no_reward(problem: Problem, response: str) -> None:
    """The reward of what only comparisons can judge."""


def final_text(response: str) -> str | None:
    """What a response says after its thoughts; None for nothing."""
    return (after_thoughts(response) or "").strip() or None


# ---- the table

def hub(name: str, split: str = "train", config: str | None = None) -> dict:
    """A source of data/text/sources.py."""
    source = {"hf": name, "split": split}
    if config:
        source["config"] = config
    return source


@dataclass(frozen=True)
class Set:
    read: Callable[[dict], Problem]     # its family and key are set when it is loaded
    reward: Callable[[Problem, str], float | None]
    train: dict | None = None           # the official splits: sources of data/text/sources.py
    test: dict | None = None


SETS = {
    "gsm8k": Set(
        gsm8k, math_reward,
        train=hub("openai/gsm8k", "train", "main"),
        test=hub("openai/gsm8k", "test", "main")),
    "hendrycks_math": Set(
        hendrycks_math, math_reward,
        train=hub("DigitalLearningGmbH/MATH-lighteval", "train", "default"),
        test=hub("DigitalLearningGmbH/MATH-lighteval", "test", "default")),
    "math500": Set(hendrycks_math, math_reward, test=hub("HuggingFaceH4/MATH-500", "test")),
    # its only split is called train
    "aime24": Set(aime, math_reward, test=hub("HuggingFaceH4/aime_2024")),
    "aime25": Set(aime, math_reward, test=hub("math-ai/aime25", "test")),
    # gated
    "gpqa": Set(gpqa, math_reward, test=hub("Idavidrein/gpqa", config="gpqa_diamond")),
    "dapo": Set(dapo, math_reward, train=hub("BytedTsinghua-SIA/DAPO-Math-17k")),
    "bigmath": Set(bigmath, math_reward, train=hub("SynthLabsAI/Big-Math-RL-Verified")),
    "humaneval": Set(
        programs.humaneval, programs.reward, test=hub("openai/openai_humaneval", "test")),
    "mbpp": Set(
        programs.mbpp, programs.reward,
        train=hub("google-research-datasets/mbpp", "train", "sanitized"),
        test=hub("google-research-datasets/mbpp", "test", "sanitized")),
    "mbpp_full": Set(
        programs.mbpp, programs.reward,
        train=hub("google-research-datasets/mbpp", "train", "full"),
        test=hub("google-research-datasets/mbpp", "test", "full")),
    "kodcode": Set(programs.kodcode, programs.reward, train=hub("KodCode/KodCode-V1")),
    # the official data set is a script; a copy of it
    "livecodebench": Set(
        livecodebench.read, livecodebench.reward,
        test=hub("lighteval/code_generation_lite", "test", "release_v6")),
    "synthetic": Set(synthetic.read, synthetic.reward),
    "helpsteer3": Set(
        request, no_reward,
        train=hub("nvidia/HelpSteer3", "train", "preference"),
        test=hub("nvidia/HelpSteer3", "validation", "preference")),
    "ultrafeedback": Set(
        request, no_reward,
        train=hub("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        test=hub("HuggingFaceH4/ultrafeedback_binarized", "test_prefs")),
    "ifeval": Set(ifeval.read, ifeval.reward, test=ifeval.SOURCE),
    # of a PATH alone, of prompts
    "constraints": Set(constraints.read, ifeval.reward),
    "constraints_share": Set(constraints.read, ifeval.share),
    "constraints_new": Set(constraints.read_new, ifeval.reward),
    # of a PATH alone, one of its files of questions
    "bfcl": Set(bfcl.read, bfcl.reward),
}


def family(spec: str) -> SimpleNamespace:
    """The `problems` and `reward` of "name" or "name=PATH"; UserError for an unknown name.

    And `offered(response)`, the answer that is judged, None for none; `judge(problem, response)`,
    where there is a verifier for what rules leave open; `same(answer, other)` where answers can be
    compared with each other, by plain rules alone. These two are None where a set has none.
    """
    name, _, path = spec.partition("=")
    if name not in SETS:
        raise UserError(f"no task {spec!r}; there are {', '.join(GENERATED)}, and the data sets "
                        f"{', '.join(SETS)}, also as name=PATH")
    if path and not glob.glob(path):
        raise UserError(f"task {spec}: no .jsonl, .json or .parquet file at {path}")
    is_math = SETS[name].reward is math_reward
    return SimpleNamespace(
        problems=functools.partial(problems, name, path),
        reward=SETS[name].reward,
        judge=math_judge if is_math else None,
        offered=math_answer if is_math else final_text,
        same=same_math if is_math else None)


def problems(name: str, path: str, split: str, n: int, seed: int) -> list[Problem]:
    """The first n of a shuffle by the seed; all of them if there are fewer."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'dev' or 'test'")
    official = SETS[name]
    if path:
        rows = load(name, path, "")
        choices = [problem for problem in rows if problem.extra.get("split", split) == split]
    elif split == "test" and official.test:
        choices = load(name, "", "test")
    elif official.train:
        loaded = load(name, "", "train")
        choices = [problem for problem in loaded if _split_within(problem, official) == split]
    elif official.test:
        raise UserError(f"{name} has only the split \"test\"")
    else:
        raise UserError(f"{name} wants files: {name}=PATH")
    return shuffled(seeded_rng("problems", seed), choices)[:n]


def _split_within(problem: Problem, official: Set) -> str:
    """Which split of ours a problem of the official training split is in."""
    split = assign_split(digest(problem))
    return "train" if split == "test" and official.test else split


def digest(problem: Problem) -> str:
    """What the same problem has in common in all sets."""
    return problem.key.rpartition(" ")[2]


# ---- reading

@functools.cache
def load(name: str, path: str, split: str) -> tuple[Problem, ...]:
    """All problems of a file or an official split, in its order.

    Prints how many rows were left out and why.
    """
    if name == "bfcl":                          # questions and answers are two files
        return tuple(bfcl.load(path))
    left_out = Counter()
    rows = read_files(path, left_out) if path else read_hub(name, split)
    loaded = _read_rows(name, rows, left_out)
    if SETS[name].reward is math_reward:
        unreadable = set(answers.check_golds([problem.answer for problem in loaded]))
        left_out["gold cannot be read"] += len(unreadable)
        loaded = [problem for i, problem in enumerate(loaded) if i not in unreadable]
    counts = [f"{count} {reason}" for reason, count in left_out.most_common() if count]
    reasons = ", ".join(counts)
    if not loaded:
        source = path or getattr(SETS[name], split)["hf"]
        raise UserError(f"{source}: no problems for {name}: {reasons or 'no rows'}")
    if reasons:
        print(f"{name}: {len(loaded)} problems; rows left out: {reasons}", file=sys.stderr)
    return tuple(loaded)


def _read_rows(name: str, rows: Iterator[tuple[str, dict]], left_out: Counter) -> list[Problem]:
    """The different problems of the rows; counts in left_out why a row is none."""
    known = {}          # by the hash of their text
    repeats = 0         # known problems in a row
    for where, row in rows:
        is_first = not known and not left_out
        problem = _read_row(name, where, row, is_first, left_out)
        if problem is None:
            continue
        text = " ".join(problem.key.split())
        hashed = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        if hashed in known:
            repeats += 1
            left_out["there twice"] += 1
        else:
            repeats = 0
            known[hashed] = replace(problem, family=name, key=f"{name} {hashed}")
        if repeats >= max(len(known), REPEATS):     # DAPO-Math-17k holds itself 100 times
            break
    return list(known.values())


def _read_row(name: str, where: str, row: dict, is_first: bool, left_out: Counter
              ) -> Problem | None:
    try:
        return SETS[name].read(row)
    except KeyError as missing:
        if is_first:        # a wrong file, not a bad row
            columns = ", ".join(row)
            raise UserError(f"{where}: no column {missing} for {name}; found {columns}") from None
        left_out[f"without {missing}"] += 1
    except ValueError as error:
        # of our own, or a subclass, as of json: that says nothing of the row
        left_out[str(error) if type(error) is ValueError else "malformed"] += 1
    except (TypeError, LookupError, AttributeError, SyntaxError, RecursionError):
        left_out["malformed"] += 1
    return None


def read_hub(name: str, split: str) -> Iterator[tuple[str, dict]]:
    source = getattr(SETS[name], split)
    try:
        for part in sources.parts(source):
            for number, row in sources.read(source, part):
                yield f"data set {source['hf']}, row {number}", row
    except UserError as error:
        raise UserError(f"{error}; as a task that is {name}=PATH") from None


def read_files(where: str, left_out: Counter) -> Iterator[tuple[str, dict]]:
    """(file:number, row) of a file, or of a folder's .jsonl and .parquet files.

    Of a folder without such: of its .json files.
    """
    path = Path(where).expanduser()
    tables, arrays = [], []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        kind = Path(file.name.lower().removesuffix(".gz")).suffix
        if kind in (".jsonl", ".parquet") and file.is_file():
            tables.append(file)
        elif kind == ".json" and file.is_file():
            arrays.append(file)
    if not tables and not arrays:
        raise UserError(f"no .jsonl, .json or .parquet file (or .gz of one) at {where}")

    def bad_line(where: str, what: str) -> None:
        left_out["not JSON"] += 1

    for file in tables:
        source, part = {"path": str(file)}, sources.Part(str(file))
        for number, row in sources.read(source, part, bad_line=bad_line):
            yield f"{file}:{number}", row
    if not tables:
        for file in arrays:
            for number, row in enumerate(read_json(file), 1):
                yield f"{file}:{number}", row


def read_json(file: Path) -> list:
    """The rows of a file that is one JSON array, or one object, or JSON lines of another name."""
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as f:
            text = f.read().decode("utf-8-sig")
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return rows if isinstance(rows, list) else [rows]
