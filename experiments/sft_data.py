"""What are refinement and reconstruction of SFT data worth?

    python -m experiments.sft_data --seeds 3     # after speedrun.sh; 27 minutes on 2 cores

Responses to the same problems, made in several ways. (a), (b) and (c) have all problems; (d) and
(e) those whose chain of thought was reconstructed. To leave the others out of (b) and (c), too,
would favour (c): a chain is kept only where it leads to (c)'s own answer. The first table has the
same trained tokens for all arms, the second the same epochs of each arm's rows. See
experiments/runner.py.
"""
import json
from pathlib import Path

import common
from common import UserError
from data.chat.template import split_thoughts
from experiments import runner
from experiments.runner import SPEEDRUN, Experiment, Run, Train, call
from experiments.stats import best_rates, compare, describe_rates

ARMS = {
    "a": "raw drafts",
    "b": "best of N under the same checks, at equal writer tokens",
    "b'": "the same, answer only",
    "c": "refined answer only",
    "d": "refined answer, the draft's old chain",
    "e": "refined answer, reconstructed chain",
    "e/4": "the same, a quarter of the rows",
    "e/16": "the same, a sixteenth",
}
WHOLE_ARMS = [arm for arm in ARMS if "/" not in arm]
TABLES = {"the same trained tokens": "tokens", "two epochs of each arm's rows, one seed": "rows"}
PAIRS = [("c", "b'"), ("e", "d"), ("e", "b"), ("b", "a"), ("e", "a"), ("e", "e/4"), ("e/4", "e/16")]
RATES = (2e-3, 4e-3, 8e-3)
TRAINED_TOKENS = 100_000                          # of each run in the first table
EPOCHS = 2.0                                      # of each run in the second
MIXTURE = dict(math=3, code=4, form=3, tools=2)   # configs/tiny.py's last stage, without
                                                  # programs made by machine and passkeys
STAGE = dict(name="sft", lr=[1, 0.01], curve="1-sqrt", context=256)
REFINED = SPEEDRUN / "refine"
BEST_OF_N = SPEEDRUN / "best"
DATA = Path("out/sft_data/arms")


class SftRun(Run):
    phase = "sft"

    def settings(self) -> dict[str, object]:
        return {"init_from": str(SPEEDRUN / "pretrain"), "sft.data": str(data_folder(self.arm)),
                "sft.lr": self.lr, "sft.seed": self.seed,
                "sft.stages": [json.loads(stage) for stage in self.stages],
                "sft.compare": False}


def data_folder(arm: str) -> Path:
    return DATA / arm.replace("/", "-")


# --------------------------------------------------------------------------------------------------
# The arms' conversations

def prepare() -> dict[str, int]:
    """Writes each arm's conversations; returns its rows."""
    if not (REFINED / "report.json").is_file():
        raise UserError("there is no out/tiny/refine: run `bash speedrun.sh` first")
    call(["refine.py", "configs/tiny.py", "--run=tiny", f"--refine.folder={BEST_OF_N}",
          "--refine.n_drafts=2", "--refine.rounds=0", "--refine.completer="],
         Path("out/sft_data/best.log"))
    share = share_of_second_drafts()
    n_rows = dict.fromkeys(ARMS, 0)
    for name in MIXTURE:
        for arm, conversations in make_conversations(name, share).items():
            path = data_folder(arm) / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(conversation) + "\n" for conversation in conversations)
            if not path.is_file() or path.read_text() != text:
                common.write_atomic(path, text)
            n_rows[arm] += len(conversations)
    return n_rows


def share_of_second_drafts() -> float:
    """The share of the problems whose second drafts (b) may choose from, as well as the first.

    Best of N then lets the writers write as many tokens as refinement did.
    """
    refinement = json.loads((REFINED / "report.json").read_text())["usage"]
    best_of_n = json.loads((BEST_OF_N / "report.json").read_text())["usage"]
    tokens = count_written(refinement, "draft", "checklist", "evaluate", "revise")
    checklists = count_written(best_of_n, "checklist")
    drafts = count_written(best_of_n, "draft", "evaluate") / 2  # of one draft a drafter
    share = (tokens - checklists) / drafts - 1
    print(f"refinement wrote {tokens:,} tokens; for best of N that is a second draft of each "
          f"drafter for {share:.1%} of the problems")
    return share


def count_written(usage: dict[str, int], *roles: str) -> int:
    """Tokens that all writers wrote in these roles; usage: {"WRITER ROLE written": tokens}."""
    writers = {key.split()[0] for key in usage}
    tokens = 0
    for writer in writers:
        for role in roles:
            tokens += usage.get(f"{writer} {role} written", 0)
    return tokens


def make_conversations(name: str, share: float) -> dict[str, list[dict]]:
    """Each arm's conversations of one set of instructions."""
    kept = read_numbered(REFINED / f"{name}.jsonl")
    refined = read_numbered(REFINED / "history" / f"{name}.jsonl")
    drafted = read_numbered(BEST_OF_N / "history" / f"{name}.jsonl")
    numbers = [number for number in refined if number in drafted]
    conversations = {arm: [] for arm in ARMS}
    for i, number in enumerate(numbers):
        drafts = drafted[number]["attempts"]
        gets_second_drafts = (i * share) % 1 + share >= 1  # evenly over the problems
        if not gets_second_drafts:
            drafts = first_of_each_writer(drafts)
        replies = make_replies(i, refined[number], drafts, kept.get(number))
        if "e" in replies:
            for n in (4, 16):
                if len(conversations["e"]) % n == 0:
                    replies[f"e/{n}"] = replies["e"]
        for arm, reply in replies.items():
            if reply["content"].strip():
                messages = [*refined[number]["instruction"], reply]
                conversations[arm].append({"messages": messages})
    return conversations


def first_of_each_writer(drafts: list[dict]) -> list[dict]:
    firsts = {}
    for draft in drafts:
        firsts.setdefault(draft["writer"], draft)
    return list(firsts.values())


def read_numbered(path: Path) -> dict[int, dict]:
    """{number: record} of a file of refine.py."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["number"]: record for record in records}


def make_replies(i: int, refined: dict, drafts: list[dict], kept: dict | None) -> dict[str, dict]:
    """{arm: the reply to a problem}.

    i: the problem's place. refined: its attempts by refine.py. drafts: those of best of N. kept:
    its conversation, where one was kept; without a summary the chain is the response's own.
    """
    attempts = refined["attempts"]
    first_drafts = [attempt for attempt in attempts if attempt["round"] == 0]
    best_draft = max(drafts, key=lambda attempt: attempt["score"])
    _, answer = split_thoughts(attempts[refined["best"]]["response"])
    refined_answer = {"response": answer}
    replies = {
        "a": make_reply(first_drafts[i % len(first_drafts)]),
        "b": make_reply(best_draft),
        "b'": make_reply(best_draft, chain=""),
        "c": make_reply(refined_answer, chain=""),
    }
    if kept and kept["summary"]:
        best_first_draft = max(first_drafts, key=lambda attempt: attempt["score"])
        old_chain, _ = split_thoughts(best_first_draft["response"])
        replies["d"] = make_reply(refined_answer, chain=old_chain)
        replies["e"] = kept["messages"][-1]
    return replies


def make_reply(attempt: dict, chain: str | None = None) -> dict:
    """An assistant message of a response: with its own chain of thought, another, or none ("")."""
    own_chain, content = split_thoughts(attempt["response"])
    if chain is None:
        chain = own_chain
    reply = {"role": "assistant", "content": content}
    if chain:
        reply["reasoning"] = chain
    return reply


# --------------------------------------------------------------------------------------------------
# The runs and their tables

def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results."""
    n_rows = prepare()
    print("rows: " + ", ".join(f"({arm}) {n:,}" for arm, n in n_rows.items()))
    tokens = round(TRAINED_TOKENS * scale)
    by_tokens = json.dumps(STAGE | dict(trained_tokens=tokens, mixture=MIXTURE))
    by_rows = json.dumps(STAGE | dict(epochs={name: EPOCHS * scale for name in MIXTURE}))
    sweep = []
    for lr in RATES:
        for arm in WHOLE_ARMS:
            sweep.append(SftRun("sft_data", "sweep", arm, 100, lr, "dev", (by_tokens,)))
    sweep = train(sweep)
    rates = best_rates(sweep)
    rates |= {"e/4": rates["e"], "e/16": rates["e"]}
    runs = []
    for seed in range(seeds):
        for arm in ARMS:
            lr = rates[arm]
            runs.append(SftRun("sft_data", "tokens", arm, seed, lr, "test", (by_tokens,)))
    for arm in WHOLE_ARMS:
        runs.append(SftRun("sft_data", "rows", arm, 0, rates[arm], "test", (by_rows,)))
    return sweep + train(runs)


def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    text = describe_rates(results)
    for title, table in TABLES.items():
        rows = [r for r in results if r["table"] == table]
        trained = {r["arm"] for r in rows}
        arms = {arm: what for arm, what in ARMS.items() if arm in trained}
        pairs = [pair for pair in PAIRS if trained.issuperset(pair)]
        text += f"\n\n### {title}\n\n{compare(rows, arms, pairs)}"
    return text


EXPERIMENT = Experiment("sft_data", "configs/tiny_sft_data.py", run_arms, make_tables)


def main():
    runner.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    common.cli(main)
