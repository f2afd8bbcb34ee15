"""datatrove's side of checks.engine_speed, run by a Python that has it: it needs nothing of ours.

    python checks/engine_peer.py tokens FILE.jsonl TOKENIZER FOLDER
    python checks/engine_peer.py duplicates FILE.jsonl FOLDER

The first makes tokens of the documents, the second finds duplicates among them. A line of JSON
tells the CPU-seconds, and the number of tokens, or the numbers of the documents that are left out.
"""
import json
import os
import struct
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def execute(*pipeline) -> None:
    LocalPipelineExecutor(list(pipeline), tasks=1, workers=1, skip_completed=False,
                          logging_dir=None).run()


def make_tokens(file: str, tokenizer: str, folder: str) -> dict:
    execute(JsonlReader(file), DocumentTokenizer(folder, tokenizer, shuffle_documents=False))
    n_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.ds"))
    return {"tokens": n_bytes // 2}


def find_duplicates(file: str, folder: str) -> dict:
    signatures, buckets = f"{folder}/signatures", f"{folder}/buckets"
    left_out = f"{folder}/left_out"
    execute(JsonlReader(file), MinhashDedupSignature(signatures))
    n_buckets = 14  # a task each, as its own examples have it
    LocalPipelineExecutor([MinhashDedupBuckets(signatures, buckets)], tasks=n_buckets, workers=1,
                          logging_dir=None).run()
    execute(MinhashDedupCluster(buckets, left_out))
    data = b"".join(path.read_bytes() for path in Path(left_out).glob("*.remove"))
    return {"left_out": sorted(struct.unpack(f"<{len(data) // 4}I", data))}


def main() -> None:
    kind, *arguments = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what datatrove prints goes to stderr
    started = time.process_time()
    found = make_tokens(*arguments) if kind == "tokens" else find_duplicates(*arguments)
    seconds = time.process_time() - started
    print(json.dumps({"seconds": seconds} | found), file=answer)


if __name__ == "__main__":
    main()
