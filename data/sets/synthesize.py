"""Code problems made by machine, both ways, kept only if the sandbox agrees.

After arXiv 2512.06266, section 6, stage 2.

    python -m data.sets.synthesize configs/tiny.py

forward   a statement first; from it a solution and tests
backward  a solution and its tests first; from them the statement

Writes, into synthesize.folder, forward.jsonl and backward.jsonl, each a task by name
("synthetic=out/synthetic/forward.jsonl"); programs.jsonl, some of their training problems as
conversations for SFT; and counts.json, how many were made, refused (and why) and kept. Done once:
the same settings find it all there. A hash of the problem decides its split, as in the generated
families.

With a writer (`synthesize.writer`) statements start from topics, and solutions are functions of
real code. Without one both come from small grammars. Kept is a problem whose known solution passes
its tests while each of several wrong variants of it fails; with a writer, a second solution,
written from the statement alone, must pass too: else the statement does not say all, or the first
solution is wrong. The report does not describe the checks beyond the first: our choice.
"""
from settings import Count, CountOr0, Seed, Sources, from_dict, load_config

import ast
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import common
from common import progress_bar
from data.chat.template import after_thoughts
from data.llm import LLM, LLMConfig, cached, http_llm
from data.sets import synthetic
from data.sets.fences import PYTHON, fenced_blocks
from data.sets.programs import mutants
from data.sets.synthetic import passes_tests
from data.tasks import code
from data.tasks.problem import assign_split, between, pick, seeded_rng, shuffled, to_chat
from data.text.sources import ReadPosition, texts
from data.verify import jail, sandbox
from data.verify.sandbox import Sandbox


@dataclass
class SynthesizeConfig:
    n: CountOr0 = 200          # problems tried each way
    variants: Count = 4        # wrong variants of each solution, all of which must fail
    conversations: CountOr0 = 0  # training problems of each way that SFT gets, with their solutions
    seed: Seed = 0
    folder: str = ""           # default: out/<run>/synthetic
    writer: dict = field(default_factory=dict)  # LLMConfig of the model that writes; {}: the
                                                # grammars below
    topics: list[str] = field(default_factory=lambda: list(TOPICS))  # what statements begin with,
                                                                     # forward
    functions: Sources = field(default_factory=lambda: [{"stdlib": 12}])  # of Python files,
                                                                          # backward


TOPICS = (
    "strings", "lists of numbers", "dictionaries", "sorting", "searching", "dates", "intervals",
    "matrices", "number theory", "geometry", "graphs as dictionaries", "dynamic programming",
    "parsing", "simulation", "text formatting", "sets", "bit operations", "combinatorics",
    "stacks and queues", "state machines",
)

FORWARD = """Write one programming exercise about {topic}, number {number} of a varied series. \
It asks for one Python function with arguments and a result of plain data: numbers, strings, \
lists, tuples, dictionaries. It gives the name and the signature, says what is returned in \
every case, and shows two examples. Answer with the exercise and nothing else."""
SOLVE = """{question}

Answer with one ```python block that defines the function."""
TESTS = """Here is an exercise and its solution.

{question}

```python
{solution}
```

Answer with one ```json block: a list of at least eight tests, each [[arguments], result], that \
cover the usual cases and the edges."""
INPUTS = """Here is a Python function.

```python
{solution}
```

Answer with one ```json block: a list of at least eight lists of arguments that reach every \
branch of it and do not make it fail."""
BACKWARD = """Here is a Python function, and what it returns.

```python
{solution}
```
{examples}

Write the exercise whose solution this is, for somebody who does not see the code: the name and \
the signature, what is returned in every case, and two of the examples. Answer with the \
exercise and nothing else."""


# --------------------------------------------------------------------------------------------------
# Drafts by a writer: dicts of question, name, solution, tests and a second solution

def forward(llm: LLM, topics: list[str], n: int) -> list[dict]:
    """Statement, then solution, then tests.

    The results of the tests are claimed by the writer and checked by the sandbox.
    """
    prompts = []
    for i in range(n):
        topic = topics[i % len(topics)]
        prompts.append(FORWARD.format(topic=topic, number=i // len(topics) + 1))
    drafts = [{"question": text.strip()} for text in ask(llm, prompts) if text.strip()]
    drafts = solve(llm, drafts, "solution")
    answers = ask(llm, [TESTS.format(**draft) for draft in drafts])
    for draft, answer in zip(drafts, answers):
        tests = parse_tests(answer, is_pair)
        draft["tests"] = [[jail.encode(tuple(a)), jail.encode(value)] for a, value in tests]
    return solve(llm, drafts, "second")


def backward(llm: LLM, functions: list[str], box: Sandbox) -> list[dict]:
    """Solution and inputs, then results by running it, then the statement."""
    drafts = [{"solution": text, "name": last_function_name(text)} for text in functions]
    answers = ask(llm, [INPUTS.format(**draft) for draft in drafts])
    for draft, answer in zip(drafts, answers):
        draft["tests"] = run_solution(draft, parse_tests(answer), box)
    drafts = [draft for draft in drafts if draft["tests"]]
    prompts = []
    for draft in drafts:
        examples = write_examples(draft, 3)
        prompts.append(BACKWARD.format(solution=draft["solution"], examples=examples))
    for draft, answer in zip(drafts, ask(llm, prompts)):
        draft["question"] = answer.strip()
    return solve(llm, [draft for draft in drafts if draft["question"]], "second")


def ask(llm: LLM, prompts: list[str]) -> list[str]:
    """The answers behind their chains of thought; "" for none."""
    answers = llm([[{"role": "user", "content": prompt}] for prompt in prompts])
    return [after_thoughts(answer or "") or "" for answer in answers]


def solve(llm: LLM, drafts: list[dict], key: str) -> list[dict]:
    """The drafts for which the writer gave a function, which becomes draft[key].

    The name of the first one becomes the draft's.
    """
    form = SOLVE
    if key == "second":     # other words, so that it is no copy out of the writer's cache
        form += " Think of the edge cases."
    answers = ask(llm, [form.format(**draft) for draft in drafts])
    for draft, answer in zip(drafts, answers):
        draft[key] = last_block(answer, PYTHON)
        draft.setdefault("name", last_function_name(draft[key]))
    return [draft for draft in drafts if draft[key] and draft["name"]]


def last_block(answer: str, languages: tuple[str, ...]) -> str:
    """The last fenced block of an answer in one of the languages; "" if there is none."""
    blocks = [block.code for block in fenced_blocks(answer) if block.language in languages]
    return blocks[-1].strip() if blocks else ""


def parse_tests(answer: str, fits: Callable = lambda test: True) -> list:
    """The lists of an answer's JSON block; none if it is no list of lists that fit."""
    try:
        tests = json.loads(last_block(answer, ("json",)))
        if not isinstance(tests, list):
            return []
        return tests if all(isinstance(test, list) and fits(test) for test in tests) else []
    except (ValueError, RecursionError):
        return []


def is_pair(test: list) -> bool:
    """Whether it is [[arguments], result]."""
    return len(test) == 2 and isinstance(test[0], list)


def last_function_name(solution: str) -> str:
    """The name of its last function, "" if it has none: helpers come first."""
    try:
        nodes = ast.parse(solution).body
    except (SyntaxError, ValueError, RecursionError):
        return ""
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return names[-1] if names else ""


def standalone_functions(files: Iterator[str]) -> Iterator[str]:
    """Functions of Python files that may stand alone.

    Plain ones of 4 to 40 lines, with arguments and a result.
    """
    for text in files:
        try:
            nodes = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            if not isinstance(node, ast.FunctionDef):
                continue
            source = ast.get_source_segment(text, node)
            is_plain = not node.decorator_list and node.args.args
            if source and is_plain and 4 <= source.count("\n") + 1 <= 40 and returns_value(node):
                yield source


def returns_value(function: ast.FunctionDef) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value:
            return True
    return False


def run_solution(draft: dict, inputs: list, box: Sandbox) -> list:
    """[arguments, result] of each input; none if one fails or gives what is no plain data."""
    result = box.call(draft["solution"], draft["name"], inputs)
    if result.status != "ok" or any(isinstance(value, jail.Raised) for value in result.values):
        return []
    try:
        return [[jail.encode(tuple(a)), jail.encode(value)]
                for a, value in zip(inputs, result.values)]
    except TypeError:
        return []


def write_examples(draft: dict, n: int) -> str:
    lines = []
    for encoded, value in draft["tests"][:n]:
        arguments = ", ".join(map(repr, jail.decode(encoded)))
        lines.append(f"{draft['name']}({arguments}) = {jail.decode(value)!r}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Drafts by grammar

def forward_by_grammar(rng: random.Random, level: int) -> dict:
    """A problem of the family `code`, which wants a whole program here.

    Its statement is a composition of operations, its results follow from what they mean, its
    solution from how they are written. Its key is that of `code`: held out there, held out here.
    """
    problem = code.make(rng, level)
    tests = [[jail.encode((x,)), jail.encode(value)] for x, value in problem.extra["tests"]]
    question = problem.question.replace("Write f(x):", "Write a program f(x):")
    solution = f"def f(x):\n    {problem.answer}\n"
    return dict(key=problem.key, question=question, name="f", solution=solution, tests=tests,
                level=level)


# words, code, range of {k}
CONDITIONS = (
    ("v is above {k}", "v > {k}", (2, 6)),
    ("v is below {k}", "v < {k}", (3, 8)),
    ("v is even", "v % 2 == 0", (0, 0)),
    ("v is odd", "v % 2 == 1", (0, 0)),
)
ACTIONS = {
    "0": (
        ("add v", "s += v", (0, 0)),
        ("take v away", "s -= v", (0, 0)),
        ("add {k} times v", "s += {k} * v", (2, 5)),
        ("add {k}", "s += {k}", (1, 9)),
    ),
    "[]": (
        ("keep v", "s += [v]", (0, 0)),
        ("keep v plus {k}", "s += [v + {k}]", (1, 9)),
        ("keep {k} times v", "s += [{k} * v]", (2, 5)),
        ("put v first", "s = [v] + s", (0, 0)),
    ),
}


def backward_by_grammar(rng: random.Random, level: int, box: Sandbox) -> dict:
    """A loop over a list first; its results by running it; then what it does, in words.

    Level 2 has an else, level 3 a stop as well. Short, as a small model's replies are.
    """
    start = pick(rng, list(ACTIONS))
    stop = between(rng, 0, 9)
    condition, test = fill_in(rng, pick(rng, CONDITIONS))
    one, other = shuffled(rng, ACTIONS[start])[:2]
    action, line = fill_in(rng, one)
    other_action, other_line = fill_in(rng, other)

    lines = ["def f(x):", f"    s = {start}", "    for v in x:"]
    words = f"Write a program f(x): a loop over x from {start}. "
    if level > 2:
        lines += [f"        if v == {stop}: break"]
        words += f"Stop at a {stop}. "
    lines += [f"        if {test}: {line}"]
    words += f"If {condition}, {action}"
    if level > 1:
        lines += [f"        else: {other_line}"]
        words += f", else {other_action}"
    lines += ["    return s"]
    solution = "\n".join(lines) + "\n"
    draft = dict(key=solution, name="f", solution=solution, level=level)

    inputs = [[[between(rng, 0, 9) for _ in range(4)]]]
    for _ in range(8):
        length = between(rng, 4, 9)
        inputs.append([[between(rng, 0, 9) for _ in range(length)]])
    inputs.append([[]])
    draft["tests"] = run_solution(draft, inputs, box)
    draft["question"] = f"{words}. Example: {write_examples(draft, 1)}."
    return draft


def fill_in(rng: random.Random, choice: tuple[str, str, tuple]) -> tuple[str, str]:
    """The words and the code of a choice, with a constant."""
    words, line, bounds = choice
    k = between(rng, *bounds)
    return words.format(k=k), line.format(k=k)


# --------------------------------------------------------------------------------------------------
# What is kept

def invalid_reason(draft: dict, variants: int, rng: random.Random, box: Sandbox) -> str:
    """Why a draft is no problem to learn from; "" if it is one."""
    name, tests = draft["name"], draft["tests"]
    if len(tests) < 4:
        return "fewer than 4 usable tests"
    if not passes_tests(box, draft["solution"], name, tests):
        return "the known solution fails"
    if "second" in draft and not passes_tests(box, draft["second"], name, tests):
        return "a second solution fails"
    wrong = mutants(draft["solution"], rng, variants)
    if len(wrong) < variants:
        return "too few wrong variants"
    for variant in wrong:
        if passes_tests(box, variant, name, tests) is not False:
            return "a wrong variant passes"
    return ""


def run(cfg: SynthesizeConfig, folder: Path) -> dict[str, dict]:
    """Makes, checks and writes; returns how many drafts of each way met which end."""
    box = sandbox.shared()
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.writer:
        drafts_by_way = write_drafts(cfg, folder, box)
    else:
        drafts_by_way = draw_drafts(cfg, box)
    counts, conversations, known = {}, [], set()
    for way, drafts in drafts_by_way.items():
        ends, records = Counter(), []
        for reason, draft in zip(check(drafts, way, cfg, box), drafts):
            key = draft.get("key", draft["question"])
            if not reason and key in known:
                reason = "made before"
            if not reason:
                known.add(key)
                records.append(to_record(draft, key))
            ends[reason or "kept"] += 1
        common.write_atomic(folder / f"{way}.jsonl", to_lines(records))
        training = [record for record in records if record["split"] == "train"]
        conversations += [to_conversation(record) for record in training[:cfg.conversations]]
        splits = Counter(record["split"] for record in records)
        n_made, n_kept = ends.total(), ends.pop("kept", 0)
        counts[way] = {"made": n_made, "kept": n_kept, "splits": dict(splits),
                       "refused": dict(ends.most_common())}
    common.write_atomic(folder / "programs.jsonl", to_lines(conversations))
    record = {"settings": common.hash_json(asdict(cfg)), "ways": counts}
    common.write_atomic(folder / "counts.json", json.dumps(record, indent=1) + "\n")   # the last
    return counts


def read_counts(cfg: SynthesizeConfig, folder: Path) -> dict[str, dict] | None:
    """What `run` returned, if all was made before with these settings."""
    path = folder / "counts.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("settings") != common.hash_json(asdict(cfg)):
        return None
    return record["ways"]


def to_record(draft: dict, key: str) -> dict:
    """A line of forward.jsonl or backward.jsonl, as data/sets/synthetic.py reads it."""
    record = {"split": assign_split(key), "level": draft.get("level", 2)}
    for name in ("question", "name", "solution", "tests"):
        record[name] = draft[name]
    return record


def to_conversation(record: dict) -> dict:
    return {"messages": to_chat(synthetic.read(record))}


def to_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_drafts(cfg: SynthesizeConfig, folder: Path, box: Sandbox) -> dict[str, list[dict]]:
    llm_config = from_dict(LLMConfig, cfg.writer, "synthesize.writer")
    llm = cached(http_llm(llm_config), folder / "answers.jsonl")
    files = (text for text, _ in texts(cfg.functions, ReadPosition(quiet=True), "text"))
    forward_drafts = forward(llm, cfg.topics, cfg.n)
    functions = list(islice(standalone_functions(files), cfg.n))
    return {"forward": forward_drafts, "backward": backward(llm, functions, box)}


def draw_drafts(cfg: SynthesizeConfig, box: Sandbox) -> dict[str, list[dict]]:
    def draw_forward(i: int) -> dict:
        return forward_by_grammar(seeded_rng("forward", cfg.seed, i), i % 3 + 1)

    def draw_backward(i: int) -> dict:
        return backward_by_grammar(seeded_rng("backward", cfg.seed, i), i % 3 + 1, box)

    with ThreadPoolExecutor() as pool:      # backward waits for the sandbox
        return {"forward": list(map(draw_forward, range(cfg.n))),
                "backward": list(pool.map(draw_backward, range(cfg.n)))}


def check(drafts: list[dict], way: str, cfg: SynthesizeConfig, box: Sandbox) -> Iterator[str]:
    """The invalid_reason of each draft; several at a time, since they wait for the sandbox."""
    def check_one(i: int) -> str:
        rng = seeded_rng("variants", cfg.seed, i)
        return invalid_reason(drafts[i], cfg.variants, rng, box)

    with ThreadPoolExecutor() as pool:
        reasons = pool.map(check_one, range(len(drafts)))
        yield from progress_bar(reasons, desc=way, total=len(drafts))


def format_counts(counts: dict[str, dict]) -> str:
    """The counts as a text table."""
    lines = [f"{'way':10}{'made':>7}{'kept':>7}{'train':>7}{'dev':>7}{'test':>7}  refused"]
    for way, ends in counts.items():
        line = f"{way:10}{ends['made']:>7}{ends['kept']:>7}"
        for split in ("train", "dev", "test"):
            line += f"{ends['splits'].get(split, 0):>7}"
        reasons = [f"{n} {reason}" for reason, n in ends["refused"].items()]
        lines.append(f"{line}  {', '.join(reasons)}")
    return "\n".join(lines)


def main():
    config = load_config(
        __doc__, flags=sandbox.FLAG, options=("run",), synthesize=SynthesizeConfig)
    if config.weak_jail:
        sandbox.allow_weak_jail()
    folder = Path(config.synthesize.folder or config.out / "synthetic")
    common.lock_folder(folder)
    counts = read_counts(config.synthesize, folder)
    if counts is None:
        counts = run(config.synthesize, folder)
    print(format_counts(counts))
    for way in counts:
        with open(folder / f"{way}.jsonl") as file:
            for line in islice(file, 3):
                record = json.loads(line)
                print(f"\n{record['question']}\n{record['solution']}")
    print(f"the problems are in {folder}")


if __name__ == "__main__":
    common.cli(main)
