"""lm-evaluation-harness on requests that another process has written: run by `eval_speed`, in lm_eval's environment."""

import json
import sys
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main(job_path: str, answer_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(job["threads"])
    model = HFLM(job["model"], device="cpu", dtype="float32", batch_size=job["batch"], max_length=4096)
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, continuation), idx=place)
        for place, (prompt, continuations) in enumerate(job["requests"])
        for continuation in continuations
    ]
    model.loglikelihood(instances[:4], disable_tqdm=True)  # whatever is only slow once
    begin = time.perf_counter()
    found = [float(value) for value, _ in model.loglikelihood(instances, disable_tqdm=True)]
    seconds = time.perf_counter() - begin
    values = iter(found)
    logprobs = [[next(values) for _ in continuations] for _, continuations in job["requests"]]
    Path(answer_path).write_text(json.dumps({"seconds": seconds, "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
