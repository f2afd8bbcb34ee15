"""Prompts joined with constraints: every problem can be solved, and no split sees another's."""
import itertools
import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from common import UserError
from data.sets import constraints, ifeval, public
from data.sets.constraints import NAMES, WAYS, WORDS
from data.tasks import registry

ENGLISH = "this is a plain answer in the english language and it is long enough"
OTHERS = {
    "de": "das ist ein kurzer deutscher satz über das wetter in der stadt",
    "es": "esta es una frase corta en español sobre el tiempo en la ciudad",
    "fr": "voici une phrase courte en français sur le temps dans la ville",
    "it": "questa è una frase breve in italiano sul tempo nella città",
    "pt": "esta é uma frase curta em português sobre o tempo na cidade",
}
ROWS = [{"instruction": f"Tell me about number {i}.", "response": "It is one.", "id": i}
        for i in range(150)]  # as Dolly's are
ROWS.append({"instruction": f"Sum this up: {'much ' * 50}.", "context": "A text.", "id": 150})


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def problems(name: str, path: str, split: str) -> list:
    return registry.family(f"{name}={path}").problems(split, 10**6, 0)


def short_names(problem) -> list[str]:
    return [name.partition(":")[2] for name in problem.extra["instructions"]]


def values(problem) -> dict:
    """What all constraints of a problem say; `of` a type that has no values is True."""
    said = {}
    for name, kwargs in zip(short_names(problem), problem.extra["kwargs"]):
        said[name] = kwargs or True
    return said


def at_least(kwargs: dict, count: str, relation: str = "relation") -> int:
    """How often something must be there."""
    return kwargs[count] if kwargs.get(relation, "at least") == "at least" else 0


def solve(problem) -> str:
    """A response that meets all constraints, put together from what each of them wants."""
    said = values(problem)
    if "constrained_response" in said:
        return "My answer is maybe."
    text = OTHERS[said["response_language"]["language"]] if "response_language" in said else ENGLISH
    if "english_capital" in said:  # of which the detector of languages wants more
        text += f" {ENGLISH}"
    extra = list(said.get("existence", {}).get("keywords", []))
    if "frequency" in said:
        extra += [said["frequency"]["keyword"]] * at_least(said["frequency"], "frequency")
    if "letter_frequency" in said:
        letters = said["letter_frequency"]
        extra.append(letters["letter"] * at_least(letters, "let_frequency", "let_relation"))
    if "number_placeholders" in said:
        extra += ["[a]"] * said["number_placeholders"]["num_placeholders"]
    if "number_highlighted_sections" in said:
        extra += ["*so*"] * said["number_highlighted_sections"]["num_highlights"]
    if "capital_word_frequency" in said:
        capitals = said["capital_word_frequency"]
        extra += ["SO"] * at_least(capitals, "capital_frequency", "capital_relation")
    if "title" in said:
        extra.append("<<so>>")
    if "number_words" in said:
        extra += ["and"] * at_least(said["number_words"], "num_words")
    text = " ".join([text, *filter(None, extra)])
    if "number_sentences" in said:
        text += " It is so." * at_least(said["number_sentences"], "num_sentences")
    return with_form(said, text)


def with_form(said: dict, text: str) -> str:
    """The text in the form that is wanted as a whole."""
    if "json_format" in said:
        return json.dumps([text])
    if "two_responses" in said:
        return f"{text}\n******\n{text} too"
    if "number_bullet_lists" in said:
        text += "\n- so" * said["number_bullet_lists"]["num_bullets"]
    if "multiple_sections" in said:
        sections = said["multiple_sections"]
        for i in range(sections["num_sections"]):
            text += f"\n{sections['section_spliter']} {i + 1}"
    if "number_paragraphs" in said:
        text += "\n***\nso" * (said["number_paragraphs"]["num_paragraphs"] - 1)
    if "nth_paragraph_first_word" in said:
        word = said["nth_paragraph_first_word"]["first_word"]
        text = "\n\n".join([f"{word} {text}", *[f"{word} so"] * (
            said["nth_paragraph_first_word"]["num_paragraphs"] - 1)])
    if "postscript" in said:
        text += f"\n{said['postscript']['postscript_marker']} so"
    if "repeat_prompt" in said:
        text = f"{said['repeat_prompt']['prompt_to_repeat']}\n{text}"
    if "end_checker" in said:
        text += f"\n{said['end_checker']['end_phrase']}"
    if "english_capital" in said:
        text = text.upper()
    if "english_lowercase" in said:
        text = text.lower()
    return f'"{text}"' if "quotation" in said else text


def test_ways_are_of_all_types_and_name_their_values():
    assert WAYS.keys() == NAMES.keys()
    for name, ways in WAYS.items():
        for text, choices in ways:
            shown = text.format_map({key: f"\0{key}" for key in choices})
            assert shown.count("\0") >= len(choices), text
    for one, other in itertools.permutations(WORDS, 2):
        assert one not in other
    assert not set("".join(WORDS)) & set("jqxz")


@pytest.mark.parametrize("name", ["constraints", "constraints_new"])
def test_every_problem_can_be_solved(prompts, name):
    """So no two of its constraints contradict each other, and the words ask for what is checked."""
    types = set()
    for split in ("train", "dev", "test"):
        for problem in problems(name, prompts, split):
            response = solve(problem)
            kept = dict(zip(short_names(problem), ifeval.followed(problem, response)))
            assert all(kept.values()), (problem.question, response, kept)
            assert registry.reward(problem, response) == 1.0
            types |= kept.keys()
    expected = set(NAMES) if name == "constraints" else set().union(*constraints.new_pairs())
    assert types >= expected


def test_splits_and_combinations_are_apart(prompts):
    """The same prompts are in a split of both sets; new pairs are in one of them alone."""
    assert 20 < len(constraints.new_pairs()) < 60
    seen = {}
    for split in ("train", "dev", "test"):
        old = problems("constraints", prompts, split)
        new = problems("constraints_new", prompts, split)
        assert {p.extra["split"] for p in old + new} == {split}
        seen[split] = {p.key.rpartition(" ")[2] for p in old}
        assert seen[split] == {p.key.rpartition(" ")[2] for p in new}
        assert not any(constraints.has_new_pair(short_names(p)) for p in old)
        assert all(constraints.has_new_pair(short_names(p)) for p in new)
    assert sum(map(len, seen.values())) == len(set().union(*seen.values())) == len(ROWS)
    assert len(seen["train"]) > 0.7 * len(ROWS)


def test_rewards(prompts):
    """All, or the share; nothing for nothing, or for thoughts that never end."""
    names = {"instructions": [NAMES["title"], NAMES["no_comma"]], "kwargs": [{}, {}]}
    for name, half in (("constraints", 0.0), ("constraints_share", 0.5), ("constraints_new", 0.0)):
        problem = replace(problems(name, prompts, "train")[0], extra=names)
        assert problem.family == name
        for response, expected in (("<<so>>", 1.0), ("<<so>>, so", half), ("so", half),
                                   ("so, so", 0.0), ("", 0.0), ("<think>\n<<so>>", 0.0)):
            assert registry.reward(problem, response) == expected, response


@pytest.mark.parametrize("row, prompt", [
    ({"prompt": " Why? "}, "Why?"),
    ({"instruction": "Sum up.", "context": "A text.", "response": "x"}, "Sum up.\n\nA text."),
    ({"instruction": "Why?", "input": ""}, "Why?"),
    ({"question": "Why?", "answer": "x"}, "Why?"),
    ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x"}]},
     "Why?"),
    ({"conversations": [{"from": "human", "value": "Why?"}]}, "Why?"),
    ({"prompt": [{"role": "user", "content": "Why?"}]}, "Why?"),
])
def test_prompts_of_any_form(tmp_path, row, prompt):
    path = tmp_path / "one.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    found = [p for split in ("train", "dev", "test") for p in problems("constraints", path, split)]
    [problem] = found
    assert problem.question.startswith(prompt)
    assert problem.extra["prompt"] == problem.question
    assert problem == replace(constraints.read(row), key=problem.key)


def test_bad_prompts(tmp_path, capsys):
    public.load.cache_clear()
    rows = [{"prompt": "Why?"}, {"prompt": " "}, {"prompt": [{"role": "system", "content": "x"}]},
            {"prompt": 3}, {"text": "x"}, {"prompt": "Why?"}]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "dev", "test"):
        problems("constraints", path, split)
    said = capsys.readouterr().err
    assert said.startswith("constraints: 1 problems; rows left out: ")
    for reason in ("2 prompt without a text", "1 does not begin with a user", "1 without 'prompt'",
                   "1 there twice"):
        assert reason in said
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"text": "x"}))
    with pytest.raises(UserError, match="no column 'prompt' for constraints; found text"):
        problems("constraints", path, "train")
    with pytest.raises(UserError, match="constraints wants files: constraints=PATH"):
        registry.family("constraints").problems("train", 1, 0)
