"""vLLM's side of checks.sampler_speed, run by a Python that has vLLM: it needs nothing of ours.

    python -P checks/vllm_peer.py FOLDER float32    # -P: not checks/vllm.py in place of vLLM

Says "ready", then reads a case in a line of JSON and answers with a line: the tokens that were
made, and the seconds; and so on.
"""
import json
import os
import sys
import time

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def main() -> None:
    folder, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and its processes print goes to stderr
    llm = LLM(folder, dtype=dtype, max_model_len=1024, skip_tokenizer_init=True, enforce_eager=True,
              enable_prefix_caching=False, max_num_seqs=256)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in case["prompts"]]
        stop = case["stop"]
        params = SamplingParams(
            temperature=1.0, max_tokens=case["new"], stop_token_ids=stop, ignore_eos=not stop,
            detokenize=False, logprobs=0)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
