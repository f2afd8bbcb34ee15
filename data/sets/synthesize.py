"""Code problems made by machine, both ways, kept only if the sandbox agrees (arXiv 2512.06266, section 6, stage 2).

    python -m data.sets.synthesize configs/tiny.py      # writes out/tiny/synthetic.jsonl; then the task synthetic=<file>

forward   a statement first; from it a solution and tests
backward  a solution and its tests first; from them the statement

With a writer (`synthesize.writer`) statements start from topics, and solutions are functions of real code. Without one
both come from small grammars. Kept is a problem whose known solution passes its tests while each of several wrong
variants of it fails; with a writer, a second solution, written from the statement alone, must pass too: else the
statement does not say all, or the first solution is wrong. The report does not describe the checks beyond the first:
our choice.
"""
import ast
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path


import common
from data.verify import jail, sandbox
from data.verify.sandbox import Sandbox
from data.text.sources import ReadPosition, texts
from data.chat.template import after_thoughts
from data.tasks.problem import between, pick, seeded_rng
from data.tasks import code
from data.sets.programs import mutants
from data.sets.synthetic import passes_tests
from data.llm import cached, http_llm, LLM, LLMConfig
from progress import progress_bar


@dataclass
class SynthesizeConfig:
    n: int = 200                 # problems tried each way
    variants: int = 4            # wrong variants of each solution, all of which must fail
    seed: int = 0
    writer: dict = field(default_factory=dict)  # LLMConfig of the model that writes; {}: the grammars below
    topics: list = field(default_factory=lambda: list(TOPICS))  # what statements begin with, forward
    functions: list = field(default_factory=lambda: [{"stdlib": 12}])  # sources of Python files, backward


TOPICS = ("strings", "lists of numbers", "dictionaries", "sorting", "searching", "dates", "intervals", "matrices",
          "number theory", "geometry", "graphs as dictionaries", "dynamic programming", "parsing", "simulation",
          "text formatting", "sets", "bit operations", "combinatorics", "stacks and queues", "state machines")

FORWARD = """Write one programming exercise about {topic}, number {number} of a varied series. It asks for one Python \
function with arguments and a result of plain data: numbers, strings, lists, tuples, dictionaries. It gives the name \
and the signature, says what is returned in every case, and shows two examples. Answer with the exercise and nothing \
else."""
SOLVE = """{question}

Answer with one ```python block that defines the function."""
TESTS = """Here is an exercise and its solution.

{question}

```python
{solution}
```

Answer with one ```json block: a list of at least eight tests, each [[arguments], result], that cover the usual cases \
and the edges."""
INPUTS = """Here is a Python function.

```python
{solution}
```

Answer with one ```json block: a list of at least eight lists of arguments that reach every branch of it and do not \
make it fail."""
BACKWARD = """Here is a Python function, and what it returns.

```python
{solution}
```
{examples}

Write the exercise whose solution this is, for somebody who does not see the code: the name and the signature, what is \
returned in every case, and two of the examples. Answer with the exercise and nothing else."""


# ---------------------------------------------------------------------------------------------------------------------
# Drafts by a writer: dicts of question, name, solution, tests, level and a second solution

def forward(writer: LLM, topics: list[str], n: int) -> list[dict]:
    """Statement, then solution, then tests, whose results the writer claims and the sandbox checks."""
    asked = [FORWARD.format(topic=topics[i % len(topics)], number=i // len(topics) + 1) for i in range(n)]
    drafts = [{"question": text.strip()} for text in ask(writer, asked) if text.strip()]
    drafts = solve(writer, drafts, "solution")
    answers = ask(writer, [TESTS.format(**draft) for draft in drafts])
    for draft, answer in zip(drafts, answers):
        tests = tests_of(answer, lambda test: len(test) == 2 and isinstance(test[0], list))
        draft["tests"] = [[jail.encode(tuple(a)), jail.encode(value)] for a, value in tests]
    return solve(writer, drafts, "second")


def backward(writer: LLM, functions: list[str], box: Sandbox) -> list[dict]:
    """Solution and inputs, then results by running it, then the statement."""
    drafts = [{"solution": text, "name": name_of(text)} for text in functions]
    for draft, answer in zip(drafts, ask(writer, [INPUTS.format(**draft) for draft in drafts])):
        inputs = tests_of(answer, lambda arguments: isinstance(arguments, list))
        draft["tests"] = run_solution(draft, inputs, box)
    drafts = [draft for draft in drafts if draft["tests"]]
    for draft, answer in zip(drafts, ask(writer, [
            BACKWARD.format(solution=draft["solution"], examples=examples(draft, 3)) for draft in drafts])):
        draft["question"] = answer.strip()
    return solve(writer, [draft for draft in drafts if draft["question"]], "second")


def ask(writer: LLM, prompts: list[str]) -> list[str]:
    """The answers behind their chains of thought; "" for none."""
    answers = writer([[{"role": "user", "content": prompt}] for prompt in prompts])
    return [after_thoughts(answer or "") or "" for answer in answers]


def solve(writer: LLM, drafts: list[dict], key: str) -> list[dict]:
    """The drafts for which the writer gave a function, which becomes draft[key], and the first one's name its name."""
    # other words for the second one, so that it is no copy out of the writer's cache
    form = SOLVE if key == "solution" else SOLVE + " Think of the edge cases."
    for draft, answer in zip(drafts, ask(writer, [form.format(**draft) for draft in drafts])):
        draft[key] = block(answer, "python")
        draft.setdefault("name", name_of(draft[key]))
    return [draft for draft in drafts if draft[key] and draft["name"]]


def block(answer: str, language: str) -> str:
    """The last fenced block of an answer in that language; "" if there is none."""
    found = re.findall(rf"```{language}\n(.*?)```", answer, re.DOTALL)
    return found[-1].strip() if found else ""


def tests_of(answer: str, fits: Callable) -> list:
    try:
        tests = json.loads(block(answer, "json"))
        return tests if isinstance(tests, list) and all(isinstance(t, list) and fits(t) for t in tests) else []
    except (ValueError, RecursionError):
        return []


def name_of(solution: str) -> str:
    """The name of its last function, "" if it has none: helpers come first."""
    try:
        return [node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)][-1]
    except (SyntaxError, ValueError, RecursionError, IndexError):
        return ""


def functions_of(files: Iterator[str]) -> Iterator[str]:
    """Functions of Python files that may stand alone: plain ones of 4 to 40 lines, with arguments and a result."""
    for text in files:
        try:
            nodes = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            source = ast.get_source_segment(text, node) if isinstance(node, ast.FunctionDef) else ""
            if source and not node.decorator_list and node.args.args and 4 <= source.count("\n") + 1 <= 40 and any(
                    isinstance(inner, ast.Return) and inner.value for inner in ast.walk(node)):
                yield source


def run_solution(draft: dict, inputs: list, box: Sandbox) -> list:
    """[arguments, result] of each input; none if one of them fails or gives what is no plain data."""
    result = box.call(draft["solution"], draft["name"], inputs)
    if result.status != "ok" or any(isinstance(value, jail.Raised) for value in result.values):
        return []
    try:
        return [[jail.encode(tuple(a)), jail.encode(value)] for a, value in zip(inputs, result.values)]
    except TypeError:
        return []


def examples(draft: dict, n: int) -> str:
    return "\n".join(f"{draft['name']}({', '.join(map(repr, jail.decode(a)))}) = {jail.decode(value)!r}"
                     for a, value in draft["tests"][:n])


# ---------------------------------------------------------------------------------------------------------------------
# Drafts by grammar

def forward_by_grammar(rng: random.Random, level: int) -> dict:
    """A problem of the family `code`: its statement is a composition of operations, its results follow from what they
    mean, its solution from how they are written."""
    problem = code.make(rng, level)
    tests = [[jail.encode((x,)), jail.encode(value)] for x, value in problem.extra["tests"]]
    solution = f"def f(x):\n    {problem.answer}\n"
    return dict(question=problem.question, name="f", solution=solution, tests=tests, level=level)


CONDITIONS = (("it is above {k}", "v > {k}", (2, 6)), ("it is below {k}", "v < {k}", (3, 8)),
              ("its remainder by {k} is 1", "v % {k} == 1", (2, 4)), ("it is even", "v % 2 == 0", (0, 0)))
ACTIONS = {
    "total = 0": (("add it", "total += v", (0, 0)), ("take it away", "total -= v", (0, 0)),
                  ("add {k} times it", "total += {k} * v", (2, 5)), ("add {k}", "total += {k}", (1, 9))),
    "result = []": (("keep it", "result.append(v)", (0, 0)), ("keep it plus {k}", "result.append(v + {k})", (1, 9)),
                    ("keep {k} times it", "result.append({k} * v)", (2, 5)),
                    ("put it in front", "result.insert(0, v)", (0, 0))),
}
STARTS = {"total = 0": "Begin with 0", "result = []": "Begin with an empty list"}


def backward_by_grammar(rng: random.Random, level: int, box: Sandbox) -> dict:
    """A loop over a list first; its results by running it; then what it does, in words. Level 2 has an else, level 3 a
    stop as well."""
    def draw(choices):
        words, line, bounds = pick(rng, choices)
        k = between(rng, *bounds)
        return words.format(k=k), line.format(k=k)

    start = pick(rng, list(STARTS))
    stop = between(rng, 0, 9)
    (condition, test), (action, line), (other, other_line) = draw(CONDITIONS), *map(draw, [ACTIONS[start]] * 2)
    lines = ["def f(x):", f"    {start}", "    for v in x:"]
    lines += [f"        if v == {stop}:", "            break"] * (level > 2)
    lines += [f"        if {test}:", f"            {line}"]
    lines += ["        else:", f"            {other_line}"] * (level > 1)
    lines += [f"    return {start.split()[0]}"]
    draft = dict(name="f", solution="\n".join(lines) + "\n", level=level)
    inputs = [[[between(rng, 0, 9) for _ in range(between(rng, 4, 9))]] for _ in range(9)] + [[[]]]
    draft["tests"] = run_solution(draft, inputs, box)
    draft["question"] = (
        f"Write f(x). {STARTS[start]} and go through the numbers of x" + f"; stop before the first {stop}" * (level > 2)
        + f". If {condition}, {action}" + f"; otherwise, {other}" * (level > 1)
        + f". Return the {start.split()[0]}. Example: {examples(draft, 1)}.")
    return draft


# ---------------------------------------------------------------------------------------------------------------------
# What is kept

def fault(draft: dict, variants: int, rng: random.Random, box: Sandbox) -> str:
    """Why a draft is no problem to learn from; "" if it is one."""
    if len(draft["tests"]) < 4:
        return "fewer than 4 usable tests"
    if not passes_tests(box, draft["solution"], draft["name"], draft["tests"]):
        return "the known solution fails"
    if "second" in draft and not passes_tests(box, draft["second"], draft["name"], draft["tests"]):
        return "a second solution fails"
    wrong = mutants(draft["solution"], rng, variants)
    if len(wrong) < variants:
        return "too few wrong variants"
    if any(passes_tests(box, variant, draft["name"], draft["tests"]) is not False for variant in wrong):
        return "a wrong variant passes"
    return ""


def run(cfg: SynthesizeConfig, folder: Path) -> Counter:
    """Makes, checks and writes; returns how many drafts of each way met which end."""
    box = sandbox.shared()
    with ThreadPoolExecutor() as pool:
        if cfg.writer:
            writer = cached(http_llm(common.from_dict(LLMConfig, cfg.writer, "synthesize.writer")),
                            folder / "synthetic_answers.jsonl")
            files = (text for text, _ in texts(cfg.functions, ReadPosition(quiet=True), "text"))
            made = {"forward": forward(writer, cfg.topics, cfg.n),
                    "backward": backward(writer, list(islice(functions_of(files), cfg.n)), box)}
        else:
            made = {"forward": [forward_by_grammar(seeded_rng("forward", cfg.seed, i), i % 3 + 1) for i in range(cfg.n)],
                    "backward": [backward_by_grammar(seeded_rng("backward", cfg.seed, i), i % 3 + 1, box)
                                 for i in range(cfg.n)]}
        ends, lines, seen = Counter(), [], set()
        for way, drafts in made.items():
            faults = pool.map(lambda pair: fault(pair[1], cfg.variants, seeded_rng("variants", cfg.seed, pair[0]), box),
                              enumerate(drafts))
            for draft, reason in zip(drafts, progress_bar(faults, desc=way, total=len(drafts))):
                reason = reason or ("twice" if draft["question"] in seen else "")
                seen.add(draft["question"])
                ends[way, reason or "kept"] += 1
                if not reason:
                    draft = {"level": 2} | draft | {"way": way}
                    lines.append(json.dumps({k: v for k, v in draft.items() if k != "second"}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    common.write_atomic(folder / "synthetic.jsonl", "".join(lines))
    return ends


def main():
    cfg = common.load_config(__doc__, flags=sandbox.FLAG, synthesize=SynthesizeConfig)
    if cfg.unsafe_exec:
        sandbox.allow_unlocked()
    ends = run(cfg.synthesize, cfg.out)
    for (way, end), n in sorted(ends.items()):
        print(f"{way:10}{n:6}  {end}")
    with open(cfg.out / "synthetic.jsonl") as f:
        for line in islice(f, 0, None, max(1, ends.total() // 4)):
            draft = json.loads(line)
            print(f"\n{draft['question']}\n{draft['solution']}")
    print(f"the problems are in {cfg.out / 'synthetic.jsonl'}")


if __name__ == "__main__":
    common.cli(main)
