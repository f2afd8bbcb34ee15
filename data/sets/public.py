"""Public data sets as task families, with `problems(split, n, seed)` and `reward(problem, response)` like the others.

    gsm8k          by name, from the Hugging Face hub
    gsm8k=PATH     rows of the same form in a .jsonl, .json or .parquet file, or .gz of one, or a folder of such

By name, "test" is the official test split, and "dev" a tenth of the official training split, which "train" goes
without. A set that has no test split is cut in three, one that has nothing else gives only "test". A PATH gives all its
rows for any split. A hash of the problem's text decides, so that one which two sets share is on one side in both.

Rows that are no problems (empty, malformed, an answer that cannot be read, a problem that was there before) are left
out, and counted on stderr.
"""
import functools
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
from data.text import sources
from data.verify import answers
from data.tasks.pages import FAMILIES
from data.tasks.problem import Problem, seeded_rng, shuffled, assign_split
from data.chat.template import after_thoughts
from data.sets import bfcl, ifeval, livecodebench, programs, synthetic

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
REPEATS = 10_000                # so many known problems in a row, and no fewer than are known: the set repeats itself


# ---- mathematics: a record to a problem; KeyError for a missing column, ValueError for what else makes it unusable

def text_of(record: dict, *columns: str) -> str:
    """The first of these columns that the record has."""
    column = next((column for column in columns if column in record), None)
    if column is None:
        raise KeyError(columns[0])
    value = record[column]
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f"empty {column}")
    return text


def math_problem(raw: str, answer: str, steps: tuple[str, ...] = (), level: int = 0, **extra) -> Problem:
    question = raw + INSTRUCTION
    extra |= {"reply": "\\boxed{{}}", "prompt": f"Problem: {question}\nWork:"}     # also where the work is not known
    return Problem("", raw, question, steps, answer, level, extra)


def gsm8k(record: dict) -> Problem:
    """The gold stands after '####'; the work before it has calculator marks, <<1+2=3>>, which nobody needs."""
    question, solution = text_of(record, "question"), text_of(record, "answer")
    work, mark, gold = solution.rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("answer without ####")
    steps = tuple(line.strip() for line in re.sub(r"<<.*?>>", "", work).splitlines() if line.strip())
    return math_problem(question, gold.replace(",", "").strip(), steps)


def hendrycks_math(record: dict) -> Problem:
    """MATH (arXiv 2103.03874) and MATH-500; the gold is the solution's last box where no column has it."""
    problem, solution = text_of(record, "problem"), text_of(record, "solution")
    answer = text_of(record, "answer") if "answer" in record else answers.boxed(solution)
    if not answer:
        raise ValueError("solution without a box")
    level = re.search(r"\d", str(record.get("level")))
    return math_problem(problem, answer, (solution,), int(level[0]) if level else 0)


def aime(record: dict) -> Problem:
    answer = text_of(record, "answer", "Answer", "expected_answer")
    if not re.fullmatch(r"[0-9]{1,3}", answer):
        raise ValueError("answer is no number of three digits")
    return math_problem(text_of(record, "problem", "Problem", "question"), str(int(answer)))     # "073" is 73


def dapo(record: dict) -> Problem:
    """DAPO-Math-17k (arXiv 2503.14476): an instruction stands around the problem. Or open-r1's copy of it, without."""
    prompt = record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][0]["content"]
    prompt = re.sub(r"^Solve the following math problem step by step\..*?\n\n", "", prompt, flags=re.DOTALL)
    prompt = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*$", "", prompt)
    gold = record if "solution" in record else record["reward_model"]
    return math_problem(text_of({"prompt": prompt}, "prompt"), text_of(gold, "solution", "ground_truth"))


def bigmath(record: dict) -> Problem:
    """Big-Math (arXiv 2502.17387); solve_rate: of Llama-3.1-8B, 0 to 1, None where unknown."""
    return math_problem(text_of(record, "problem"), text_of(record, "answer"),
                        solve_rate=record.get("llama8b_solve_rate"))


def gpqa(record: dict) -> Problem:
    """GPQA (arXiv 2311.12022): the question decides the order of its choices, so that it is the same in every run."""
    question, right = text_of(record, "Question"), text_of(record, "Correct Answer")
    wrong = [text_of(record, f"Incorrect Answer {i}") for i in (1, 2, 3)]
    choices = shuffled(seeded_rng("gpqa", question), [right, *wrong])
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
    return math_problem(f"{question}\n\n{listed}\n\nYour answer is one letter.", "ABCD"[choices.index(right)])


def own(response: str) -> str:
    """A base model that runs on into a next problem is judged on its own."""
    thoughts, end, text = response.rpartition("</think>")
    return thoughts + end + re.sub(r"(\nAnswer:.*)\nProblem:[\s\S]*", r"\1", text)


def math_reward(problem: Problem, response: str) -> float | None:
    return answers.reward(problem.answer, own(response))


# ---- requests that no rule judges: for comparisons

def request(record: dict) -> Problem:
    """HelpSteer3 (context: messages), UltraFeedback and the like (prompt: text or messages); of one turn alone."""
    asked = record["context"] if "context" in record else record["prompt"]
    if not isinstance(asked, str):
        if [message["role"] for message in asked] != ["user"]:
            raise ValueError("several turns")
        asked = asked[0]["content"]
    return Problem("", text_of({"prompt": asked}, "prompt"), asked, (), "", 0, {})


def nothing(problem: Problem, response: str) -> None:
    """The reward of what only comparisons can judge."""


# ---- the table

def hub(name: str, split: str = "train", config: str | None = None) -> dict:
    return {"hf": name, "split": split} | ({"config": config} if config else {})


@dataclass(frozen=True)
class Set:
    read: Callable[[dict], Problem]     # its family and key are set when it is loaded
    reward: Callable[[Problem, str], float | None]
    train: dict | None = None           # the official splits: sources of data/text/sources.py
    test: dict | None = None


SETS = {
    "gsm8k": Set(gsm8k, math_reward, hub("openai/gsm8k", "train", "main"), hub("openai/gsm8k", "test", "main")),
    "hendrycks_math": Set(hendrycks_math, math_reward, hub("DigitalLearningGmbH/MATH-lighteval", "train", "default"),
                          hub("DigitalLearningGmbH/MATH-lighteval", "test", "default")),
    "math500": Set(hendrycks_math, math_reward, test=hub("HuggingFaceH4/MATH-500", "test")),
    "aime24": Set(aime, math_reward, test=hub("HuggingFaceH4/aime_2024")),      # whose only split is called train
    "aime25": Set(aime, math_reward, test=hub("math-ai/aime25", "test")),
    "gpqa": Set(gpqa, math_reward, test=hub("Idavidrein/gpqa", config="gpqa_diamond")),     # gated
    "dapo": Set(dapo, math_reward, hub("BytedTsinghua-SIA/DAPO-Math-17k")),
    "bigmath": Set(bigmath, math_reward, hub("SynthLabsAI/Big-Math-RL-Verified")),
    "humaneval": Set(programs.humaneval, programs.reward, test=hub("openai/openai_humaneval", "test")),
    "mbpp": Set(programs.mbpp, programs.reward, hub("google-research-datasets/mbpp", "train", "sanitized"),
                hub("google-research-datasets/mbpp", "test", "sanitized")),
    "mbpp_full": Set(programs.mbpp, programs.reward, hub("google-research-datasets/mbpp", "train", "full"),
                     hub("google-research-datasets/mbpp", "test", "full")),
    "kodcode": Set(programs.kodcode, programs.reward, hub("KodCode/KodCode-V1")),
    "livecodebench": Set(livecodebench.read, livecodebench.reward,     # the official data set is a script; a copy of it
                         test=hub("lighteval/code_generation_lite", "test", "release_v6")),
    "synthetic": Set(synthetic.read, synthetic.reward),
    "helpsteer3": Set(request, nothing, hub("nvidia/HelpSteer3", "train", "preference"),
                      hub("nvidia/HelpSteer3", "validation", "preference")),
    "ultrafeedback": Set(request, nothing, hub("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
                         hub("HuggingFaceH4/ultrafeedback_binarized", "test_prefs")),
    "ifeval": Set(ifeval.read, ifeval.reward, test=ifeval.SOURCE),
    "bfcl": Set(bfcl.read, bfcl.reward),        # of a PATH alone, one of its files of questions
}


def family(spec: str) -> SimpleNamespace:
    """The `problems` and `reward` of "name" or "name=PATH"; UserError for an unknown name.

    And `offered(response)`, the answer that is judged, None for none; `same(answer, other)` where answers can be
    compared with each other, by plain rules alone, else None.
    """
    name, _, path = spec.partition("=")
    if name not in SETS:
        raise UserError(f"no task {spec!r}; there are {', '.join(FAMILIES)}, and the data sets {', '.join(SETS)}, each "
                        "of which may be given as name=PATH")
    compared = SETS[name].reward is math_reward
    return SimpleNamespace(
        problems=functools.partial(problems, name, path), reward=SETS[name].reward,
        offered=lambda response: answers.final_answer(own(response)) if compared else said(response),
        same=(lambda answer, other: answers.equal(answer, other) is True) if compared else None)


def said(response: str) -> str | None:
    return (after_thoughts(response) or "").strip() or None


def problems(name: str, path: str, split: str, n: int, seed: int) -> list[Problem]:
    """The first n of a shuffle by the seed; all of them if there are fewer."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'dev' or 'test'")
    official = SETS[name]

    def side(problem: Problem) -> str:
        chosen = assign_split(digest(problem))
        return "train" if chosen == "test" and official.test else chosen

    if path:
        found = load(name, path, "")
    elif split == "test" and official.test:
        found = load(name, "", "test")
    elif official.train:
        found = [problem for problem in load(name, "", "train") if side(problem) == split]
    else:
        raise UserError(f"{name} has only the split \"test\"" if official.test else f"{name} wants files: {name}=PATH")
    return shuffled(seeded_rng("problems", seed), found)[:n]


def digest(problem: Problem) -> str:
    """What the same problem has in common in all sets."""
    return problem.key.rpartition(" ")[2]


# ---- reading

@functools.cache
def load(name: str, path: str, split: str) -> tuple[Problem, ...]:
    """All problems of a file or an official split, in its order; prints how many rows were left out and why."""
    if name == "bfcl":                          # questions and answers are two files
        return tuple(bfcl.load(path))
    found, left_out, again = {}, Counter(), 0
    for where, record in rows_of_files(path, left_out) if path else rows_of_hub(name, split):
        try:
            problem = SETS[name].read(record)
        except KeyError as missing:
            if not found and not left_out:      # the first row: a wrong file, not a bad row
                raise UserError(f"{where}: no column {missing} for {name}; found {', '.join(record)}") from None
            left_out[f"without {missing}"] += 1
            continue
        except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError) as error:
            left_out[str(error) if type(error) is ValueError else "malformed"] += 1
            continue
        hashed = hashlib.sha256(" ".join(problem.key.split()).encode("utf-8", "replace")).hexdigest()[:16]
        again = again + 1 if hashed in found else 0
        if again:
            left_out["there twice"] += 1
        else:
            found[hashed] = replace(problem, family=name, key=f"{name} {hashed}")
        if again >= max(len(found), REPEATS):   # DAPO-Math-17k holds itself 100 times
            break
    found = list(found.values())
    if SETS[name].reward is math_reward:
        bad = set(answers.check_golds([problem.answer for problem in found]))
        left_out["gold cannot be read"] += len(bad)
        found = [problem for i, problem in enumerate(found) if i not in bad]
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common() if count)
    if not found:
        raise UserError(f"{path or getattr(SETS[name], split)['hf']}: no problems for {name}: {reasons or 'no rows'}")
    if reasons:
        print(f"{name}: {len(found)} problems; rows left out: {reasons}", file=sys.stderr)
    return tuple(found)


def rows_of_hub(name: str, split: str) -> Iterator[tuple[str, dict]]:
    source = getattr(SETS[name], split)
    try:
        for shard in sources.shards(source):
            for number, row in sources.read(source, shard):
                yield f"data set {source['hf']}, row {number}", row
    except UserError as error:
        raise UserError(f"{error}; as a task that is {name}=PATH") from None


def rows_of_files(where: str, left_out: Counter) -> Iterator[tuple[str, dict]]:
    """(file:number, row) of a file, or of a folder's .jsonl and .parquet files, or of its .json files without such."""
    path = Path(where).expanduser()
    kinds = {file: Path(file.name.lower().removesuffix(".gz")).suffix
             for file in sorted(path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    tables = [file for file, kind in kinds.items() if kind in (".jsonl", ".parquet")]
    arrays = [file for file, kind in kinds.items() if kind == ".json" and not tables]
    if not tables and not arrays:
        raise UserError(f"no .jsonl, .json or .parquet file (or .gz of one) at {where}")

    def bad_line(where: str, what: str) -> None:
        left_out["not JSON"] += 1

    for file in tables:
        for number, row in sources.read({"path": str(file)}, file, bad_line=bad_line):
            yield f"{file}:{number}", row
    for file in arrays:
        for number, row in enumerate(json_rows(file), 1):
            yield f"{file}:{number}", row


def json_rows(file: Path) -> list:
    """The rows of a file that is one JSON array, or one object, or JSON lines under another name."""
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
