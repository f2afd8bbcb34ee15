"""Does a real vLLM server sample for RL as this process does? `python -m checks.vllm
--vllm=ENVIRONMENT/bin/vllm`, after speedrun.sh; about 10 minutes on two cores.

The server is started on an export of the checkpoint, in fp32, with a prefix cache and without any
of our generation config. It is held against the trainer:

1. log-probabilities of its answers, at two temperatures, also after new weights
2. weights that were reloaded without a pause are seen by the probe
3. 20 steps of RL on arithmetic, by this process and by the server: held-out scores before, after.
   They begin at the end of SFT's first stage, where twenty steps can teach something
4. some steps with rl.ahead=1: answers by weights that are one update older, corrected by rl.tis. In
   the midst of it the server is killed while it answers, and started again

How vLLM is installed on a machine without a GPU: docs/SCALING.md.
"""
import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

import common
import hf
from checks import bench
from checks.mini import ROOT
from common import UserError
from data.tasks import registry
from evaluate import task_prompt
from experiments import results
from experiments.runner import evaluate_checkpoint
from experiments.stats import paired_difference
from kernels.cross_entropy import linear_logprobs
from sampler import Served, in_order

STEPS, AHEAD_STEPS, KILLED_AT = 20, 6, 2
CONFIG = f"""
from configs.tiny import *
rl = rl | dict(
    stages=[dict(name="STEM", problems=dict(math=640), steps={STEPS}, lr=[1, 0.1])],
    reward_model="", verifier={{}}, filter_samples=0, eval_tasks=[], prompts=[], log_every=1)
evaluate = dict(tasks=["math"], n_problems=1024, k=4, max_new_tokens=80)
"""
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the commands that reload weights
    "VLLM_TARGET_DEVICE": "cpu",  # its own kernels for what this CPU can
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = ["--dtype=float32", "--logprobs-mode=processed_logprobs", "--generation-config=vllm",
           "--enforce-eager", "--max-num-seqs=128",
           "--max-num-batched-tokens=65536"]  # vLLM 0.32 on a CPU dies of cut prompts with a seed


class Vllm:
    """A server that can be killed and started again."""

    def __init__(self, command: str, model: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [command, "serve", str(model), "--host=127.0.0.1", f"--port={self.port}"]
        self.log = open(log, "w")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.command, *OPTIONS], env=os.environ | ENVIRONMENT, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True)
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                if self.process.poll() is not None:
                    raise UserError(f"vLLM did not start: see {self.log.name}") from None
                time.sleep(1)

    def kill(self) -> None:
        """With the processes that it has started."""
        os.killpg(self.process.pid, 9)
        self.process.wait()


@torch.no_grad()
def worst_logprob(who: Served, model, tokenizer) -> tuple[float, int]:
    """The largest difference of the server's log-probabilities to the model's, of how many."""
    problems = registry.family("math").problems("dev", 16, 0)
    prompts = [task_prompt(problem, tokenizer, "chat") for problem in problems]
    worst, n = 0.0, 0
    for temperature in (0.6, 1.0):
        groups = in_order(who.sample(
            prompts, 4, max_new_tokens=80, temperature=temperature, stop=tokenizer.stop_ids))
        for prompt, group in zip(prompts, groups):
            for answer in group:
                hidden = model(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:-1]
                ours = linear_logprobs(
                    hidden, model.lm_head.weight, torch.tensor(answer.tokens), temperature)
                difference = (ours - torch.tensor(answer.logprobs)).abs().max().item()
                worst, n = max(worst, difference), n + len(answer.tokens)
    return worst, n


def check_weights(server: Vllm, source: Path, folder: Path) -> dict:
    """Log-probabilities before and after new weights; and that stale ones are seen."""
    model, tokenizer = hf.load(source)
    one = common.Dist(0, 1, torch.device("cpu"), None)
    who = Served([server.url], one, tokenizer, folder, torch.float32)
    who.expect(model)
    before, n = worst_logprob(who, model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * parameter.std() * noise
    started = time.time()
    who.update(model, 1)
    seconds = time.time() - started
    after, _ = worst_logprob(who, model, tokenizer)
    assert max(before, after) < 1e-4, (before, after)

    start, _ = hf.load(source)
    hf.export(hf.untie(start), tokenizer, folder / "stale", torch.float32)
    order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder / "stale")}}
    post(server.url + "/collective_rpc", order)
    try:
        who.expect(start)
        stale = "not seen"
    except UserError as error:
        stale = str(error)
    assert "has other weights" in stale, stale
    return dict(logprobs=n, worst_before=before, worst_after=after, update_s=seconds, stale=stale)


def post(url: str, body: dict) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()


def run_rl(folder: Path, name: str, source: Path, *options: str) -> subprocess.Popen:
    """Starts RL; it evaluates nothing itself."""
    command = [sys.executable, str(ROOT / "rl.py"), "served.py", f"--run={name}",
               f"--init_from={source}", "--evaluate.tasks=[]", *options]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=folder, env=os.environ | settings, text=True,
                            stdout=open(folder / f"{name}.log", "w"), stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path, name: str) -> dict:
    """What a run of RL came to."""
    code = process.wait()
    output = (folder / f"{name}.log").read_text()
    assert code == 0, output[-3000:]
    run = folder / "out" / name / "rl"
    lines = common.read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    rewards = [round(line["reward"], 3) for line in steps]
    mismatches = [line.get("logprob_mismatch", 0.0) for line in steps]
    seconds = [line["rollout_s"] for line in steps]
    return dict(steps=len(steps), reward=rewards, mismatch=max(mismatches),
                rollout_s=sum(seconds) / len(seconds))


def held_out(folder: Path, name: str, checkpoint: Path) -> dict:
    """A checkpoint's answers to the problems that nobody trains on: experiments.runner's result."""
    return evaluate_checkpoint("served.py", f"held_out/{name}", "test", checkpoint,
                               folder / f"held_out-{name}.log")


def describe_rise(before: dict, after: dict) -> dict:
    """The held-out score before and after RL, and half the gain's 95 % interval."""
    gain, half, _ = paired_difference([after], [before])
    return dict(before=before["avg"], after=after["avg"], gain=gain, half_interval=half)


def kill_in_the_midst(server: Vllm, folder: Path, name: str) -> str:
    """Kills the server while it answers for a step, and starts it again; what the run said."""
    sampled = folder / "out" / name / "rl" / "sampled"
    log = folder / f"{name}.log"
    while f"step {KILLED_AT:>6}/" not in log.read_text():
        time.sleep(0.05)
    while not any(sampled.glob("*.jsonl")):  # the first answers of the next step
        time.sleep(0.01)
    server.kill()
    while "waiting for" not in log.read_text():
        time.sleep(0.1)
    server.start()
    while "is back" not in log.read_text():
        time.sleep(0.1)
    lines = log.read_text().splitlines()
    return next(line for line in lines if "waiting for" in line)


def first_stage_end() -> Path:
    """Where the speedrun's SFT stood at the end of its first stage."""
    kept = [path for path in common.list_checkpoints(Path("out/tiny/sft"))
            if common.read_meta(path)["keep"]]
    if not kept:
        raise UserError("there is no out/tiny/sft: run `bash speedrun.sh`, or give --init_from")
    return kept[-1]


def check(vllm: Path, source: Path, folder: Path) -> dict:
    """All that the check finds; folder: the present one, where runs and logs are left."""
    found = {}
    (folder / "served.py").write_text(CONFIG)
    model, tokenizer = hf.load(source)
    hf.export(hf.untie(model), tokenizer, folder / "start", torch.float32)
    embedded = run_rl(folder, "embedded", source)
    server = Vllm(str(vllm), folder / "start", folder / "vllm.log")
    try:
        found["weights"] = check_weights(server, source, folder)
        print(found["weights"], flush=True)
        found["embedded"] = finish(embedded, folder, "embedded")
        servers = f"--rl.servers=['{server.url}']"
        found["served"] = finish(run_rl(folder, "served", source, servers), folder, "served")
        stages = [dict(name="STEM", problems=dict(math=100), steps=AHEAD_STEPS)]
        run = run_rl(folder, "ahead", source, servers, "--rl.ahead=1", "--rl.tis=2.0",
                     f"--rl.stages={stages}", "--rl.max_rows=32")
        said = kill_in_the_midst(server, folder, "ahead")
        found["ahead"] = finish(run, folder, "ahead") | dict(said=said)
    finally:
        embedded.kill()
        server.kill()
    start = held_out(folder, "start", source)
    for name in ("embedded", "served"):
        found[name] |= describe_rise(start, held_out(folder, name, folder / "out" / name / "rl"))
    for name in ("embedded", "served", "ahead"):
        print(name, found[name], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the command of an environment that has it")
    parser.add_argument("--init_from", default="",
                        help="checkpoint of the tiny model (default: where SFT's first stage ends)")
    parser.add_argument("--write", action="store_true", help="append to results/vllm.jsonl")
    args = parser.parse_args()
    one = common.Dist(0, 1, torch.device("cpu"), None)
    source = hf.resolve_checkpoint(one, args.init_from or str(first_stage_end())).resolve()
    vllm = Path(args.vllm).absolute()
    started = time.time()
    folder = Path(tempfile.mkdtemp())
    with contextlib.chdir(folder):
        found = check(vllm, source, folder)
    for name in ("embedded", "served"):
        assert found[name]["gain"] > found[name]["half_interval"], found[name]
    assert found["served"]["steps"] == STEPS and found["served"]["mismatch"] < 1e-4
    if args.write:
        origin = bench.describe_origin("checks.vllm", 0, torch.device("cpu"))
        results.append("vllm", origin | dict(
            config=common.hash_json(CONFIG), seconds=time.time() - started) | found)
    shutil.rmtree(folder)


if __name__ == "__main__":
    common.cli(main)
