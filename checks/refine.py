"""Is nothing lost or paid twice when refine.py is killed?

    python -m checks.refine --kills=10      # about a minute

Starts an OpenAI-compatible server whose answers follow from the request alone, runs refine.py
against it unbroken, then again, killed at random moments and started again. The files must be equal
byte for byte. A request whose answer came but was not on the disk yet at a kill must be asked
again; all others must not.
"""
import argparse
import hashlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import common
from checks.mini import ROOT, Mini
from data.llm import LLMConfig
from experiments import results

CONCURRENCY = 4       # requests in flight of each model
N_MODELS = 2
DELAY = 0.03          # seconds of an answer
START_UP = 4          # seconds that refine.py takes to start
ANSWERED = Counter()  # request -> how often its answer was sent
CONFIG = """
_model = dict(url="http://localhost:{port}/v1", model="any", concurrency={concurrency})
refine = dict(
    models=dict(one=_model, two=_model | dict(seed=1_000_000)),
    drafters=["one", "two"], checklist="one", evaluators=["one", "two"], revisers=["two"],
    completer="one", batch_size=16,
    instructions=dict(math=dict(problems=40, family="math", seed=1)))
"""


def answer(prompt: str, draw: int) -> str:
    """What a model might say: sometimes wrong, sometimes in no usable form."""
    rng = random.Random(hashlib.sha256(f"{prompt} {draw}".encode()).digest())
    operand, result, stated = (rng.randint(2, 11) for _ in range(3))
    if prompt.startswith("Write the checklist"):
        return '["It is right.", "It is short."]' if rng.random() < 0.8 else "no list"
    if prompt.startswith("Judge"):
        verdicts = []
        for _ in range(2):
            passes = rng.random() < 0.6
            verdicts.append({"pass": True} if passes else {"pass": False, "critique": "Wrong."})
        return json.dumps(verdicts) if rng.random() < 0.8 else "I cannot say."
    if prompt.startswith("Here are an instruction"):
        return "Summary: add\nChain: 2 + 2 = 4."
    return f"<think>\n{operand} + 2 = {result}.\n</think>\n\nAnswer: {stated}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(DELAY)
        text = answer(body["messages"][-1]["content"], body["seed"])
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice]}).encode()
        request = json.dumps([body["messages"], body["seed"]])
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            ANSWERED[hashlib.sha256(request.encode()).hexdigest()] += 1
        except OSError:
            pass  # the client was killed

    def log_message(self, *_):
        pass


def read_outputs(mini: Mini, run: str) -> dict[str, str]:
    """The content of each file of the run; a line of a cache may stand anywhere in it."""
    folder = mini.folder / "out" / run / "refine"
    outputs = {}
    for path in sorted(folder.rglob("*.jsonl")):
        text = path.read_text()
        if "cache" in path.parts:
            text = "\n".join(sorted(text.splitlines()))
        outputs[str(path.relative_to(folder))] = text
    return outputs


def kill_and_restart(mini: Mini, command: list[str], kills: int, rng: random.Random,
                     seconds: float) -> None:
    """Kills the command so often at a random moment, then lets it end.

    seconds: of an unbroken run; the kills are spread over it.
    """
    for _ in range(kills):
        process = mini.popen(*command)
        time.sleep(START_UP + rng.random() * max(1, seconds - START_UP) / kills * 1.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    mini.run(*command)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rng, started = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        mini = Mini(Path(folder))
        config = CONFIG.format(port=server.server_port, concurrency=CONCURRENCY)
        (mini.folder / "served.py").write_text(config)
        command = [str(ROOT / "refine.py"), "served.py"]
        begun = time.time()
        mini.run(*command, "--run=whole")
        seconds, unbroken = time.time() - begun, Counter(ANSWERED)
        ANSWERED.clear()
        kill_and_restart(mini, [*command, "--run=killed"], args.kills, rng, seconds)
        equal = read_outputs(mini, "whole") == read_outputs(mini, "killed")
    # unbroken has counts above 1, too: a further draw may have the seed of an earlier one
    twice = sum((ANSWERED - unbroken).values())
    in_flight = N_MODELS * CONCURRENCY * args.kills
    print(f"{args.kills} kills: files equal: {equal}; {len(unbroken)} requests, {twice} answered "
          f"twice (at most {in_flight} were in flight at the kills)")
    results.append("refine", dict(
        kills=args.kills, requests=len(unbroken), answered_twice=twice,
        in_flight_at_most=in_flight, equal=equal, seed=args.seed,
        commit=common.current_commit(), command=f"python -m checks.refine --kills={args.kills}",
        machine=common.describe_machine(common.torch.device("cpu")),
        seconds=time.time() - started,
        config=common.hash_json([CONFIG, LLMConfig().__dict__])))
    if not equal or unbroken - ANSWERED or twice > in_flight:
        sys.exit("error: the killed run is not the unbroken one")


if __name__ == "__main__":
    main()
