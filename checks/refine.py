"""Is nothing lost or paid twice when refine.py is killed? `python -m checks.refine --kills=10`, about a minute.

Starts an OpenAI-compatible server whose answers follow from the request alone, runs refine.py against it unbroken, then
again, killed at random moments and started again. The files must be equal byte for byte. A request whose answer came
but was not on the disk yet at a kill must be asked again; all others must not.
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
from experiments import results
from checks.mini import ROOT, Mini
from data.llm import LLMConfig

CONCURRENCY, DELAY = 4, 0.03  # requests in flight of each writer; seconds of an answer
ANSWERED = Counter()          # request -> how often its answer was sent
CONFIG = """
_writer = dict(url="http://localhost:{port}/v1", model="any", concurrency={concurrency})
refine = dict(models=dict(one=_writer, two=_writer | dict(seed=1_000_000)), drafters=["one", "two"], checklist="one",
              evaluators=["one", "two"], revisers=["two"], completer="one", batch_size=16,
              instructions=dict(math=dict(problems=40, family="math", seed=1)))
"""


def answer(prompt: str, draw: int) -> str:
    """What a writer might say: sometimes wrong, sometimes in no usable form."""
    chance = random.Random(hashlib.sha256(f"{prompt} {draw}".encode()).digest())
    operand, result, said = (chance.randint(2, 11) for _ in "123")
    reply = f"<think>\n{operand} + 2 = {result}.\n</think>\n\nAnswer: {said}"
    if prompt.startswith("Write the checklist"):
        return '["It is right.", "It is short."]' if chance.random() < 0.8 else "no list"
    if prompt.startswith("Judge"):
        verdicts = [{"pass": True} if chance.random() < 0.6 else {"pass": False, "critique": "Wrong."} for _ in "12"]
        return json.dumps(verdicts) if chance.random() < 0.8 else "I cannot say."
    return "Summary: add\nChain: 2 + 2 = 4." if prompt.startswith("Here are an instruction") else reply


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(DELAY)
        text = answer(body["messages"][-1]["content"], body["seed"])
        data = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            ANSWERED[hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()] += 1
        except OSError:
            pass  # the client was killed

    def log_message(self, *_):
        pass


def files(mini: Mini, run: str) -> dict[str, str]:
    """What was made, by name; a line of a cache may stand anywhere in it."""
    folder = mini.folder / "out" / run / "refine"
    return {str(path.relative_to(folder)): "\n".join(sorted(path.read_text().splitlines())) if "cache" in path.parts
            else path.read_text() for path in sorted(folder.rglob("*.jsonl"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rng, started = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        mini = Mini(Path(folder))
        (mini.folder / "served.py").write_text(CONFIG.format(port=server.server_port, concurrency=CONCURRENCY))
        command = [str(ROOT / "refine.py"), "served.py"]
        begun = time.time()
        mini.run(*command, "--run=whole")
        length, unbroken = time.time() - begun, dict(ANSWERED)
        ANSWERED.clear()
        for kill in range(args.kills):
            process = mini.popen(*command, "--run=killed")
            time.sleep(4 + rng.random() * max(1, length - 4) / args.kills * 1.5)  # it takes some seconds to start
            process.send_signal(signal.SIGKILL)
            process.wait()
        mini.run(*command, "--run=killed")
        same = files(mini, "whole") == files(mini, "killed")
    twice = sum((ANSWERED - Counter(unbroken)).values())  # a further draw may have the seed of an earlier one
    most = 2 * CONCURRENCY * args.kills  # two writers
    line = dict(kills=args.kills, requests=len(unbroken), answered_twice=twice, in_flight_at_most=most, equal=same,
                seed=args.seed, commit=common.current_commit(), command=f"python -m checks.refine --kills={args.kills}",
                machine=common.describe_machine(common.torch.device("cpu")), seconds=time.time() - started,
                config=common.hash_json([CONFIG, LLMConfig().__dict__]))
    print(f"{args.kills} kills: files equal: {same}; {len(unbroken)} requests, {twice} answered twice "
          f"(at most {most} were in flight at the kills)")
    results.append("refine", line)
    if not same or Counter(unbroken) - ANSWERED or twice > most:
        sys.exit("error: the killed run is not the unbroken one")


if __name__ == "__main__":
    main()
