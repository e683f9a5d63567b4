"""vLLM's AsyncLLM and the event loop that it lives on.

The loop runs only inside these methods, so everything of it happens on the caller's thread and nothing needs a lock;
the engine core is a process of its own and computes meanwhile. Knows sequences; nothing of deadlines or statistics.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams as VllmParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.backends.base import RequestRefused
from server.engine.backends.vllm.arguments import engine_config
from server.engine.backends.vllm.leash import Leash
from server.engine.backends.vllm.metrics import VllmMetrics
from server.engine.backends.vllm.options import VllmOptions
from server.engine.backends.vllm.progress import Progress, ProgressLogger
from server.engine.backends.vllm.sampling import check_params, vllm_params
from server.engine.backends.vllm.sequence import Sequence
from server.engine.messages import Generate, ModelInfo

log = logging.getLogger("qloop.engine")

HUNG_AFTER_S = 300.0  # as vLLM's own limit for one step of a worker (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
SHUTDOWN_S = 5.0
CALL_LOOK_S = 1.0
CORE_DIED = "vLLM's engine core died; its log lines above say why"
CPU_NICENESS = 5
PROBE_PRIORITY = -(2**31) - 1  # lower is sooner; the API's numbers have 32 bits
T = TypeVar("T")


class EngineCoreLost(RuntimeError):
    """vLLM's engine core died or hangs. Only a new process helps."""


class Runtime:
    def __init__(self, options: VllmOptions) -> None:
        """Starts the engine core and waits until the model is loaded. Raises ConfigError for bad settings."""
        self.progress = Progress()
        self._loop = asyncio.new_event_loop()
        self._news: asyncio.Future[None] | None = None
        self._is_interrupted = False
        config = engine_config(options)
        config.additional_config = Leash(config.additional_config, CPU_NICENESS if current_platform.is_cpu() else 0)
        self._engine = self._run(self._start(config))
        self.config = self._engine.vllm_config
        self._try_out()
        enable_envs_cache()  # or its metrics read the environment anew for every token: a sixth of this process's work

    def check(self, request: Generate, model: ModelInfo) -> None:
        check_params(request, model)

    def add(self, sequences: Seq[Sequence], model: ModelInfo, lora: LoRARequest | None) -> None:
        """Hand over the sequences of one request. Raises RequestRefused when vLLM will not have it."""
        self._run(self._add(sequences, model, lora))

    def abort(self, sequences: Seq[Sequence]) -> None:
        self._run(self._engine.abort([sequence.vllm_id for sequence in sequences], internal=True))

    def wait(self, limit_s: float) -> None:
        """Let vLLM's tasks run until `wake` or `interrupt`, at most `limit_s`."""
        self._run(self._wait(limit_s))

    def interrupt(self) -> None:
        """From any thread: end the wait that is, or the next one."""
        self._is_interrupted = True
        with contextlib.suppress(RuntimeError):  # closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """For `Sequence.receive`: there is something to take. The rest of vLLM's step is still handed out first."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def add_lora(self, name: str, number: int, path: Path) -> LoRARequest:
        """Raises whatever vLLM finds wrong with the folder; the engine goes on then. EngineCoreLost: it does not."""
        lora = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
        if not self._call(self._engine.add_lora(lora)):
            raise ValueError("vLLM did not load it")
        return lora

    def remove_lora(self, lora: LoRARequest) -> None:
        self._call(self._engine.remove_lora(lora.lora_int_id))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Of the engine core, between two of its steps. vLLM's own wait never ends when the core dies meanwhile."""
        task = self.begin(work)
        while not self.is_done(task, CALL_LOOK_S):
            if self.is_lost:
                self.cancel(task)
                raise EngineCoreLost(CORE_DIED)
        return task.result()

    async def score(self, size: int, vocab_size: int, lora: LoRARequest | None) -> list[float]:
        """Log probabilities of `size` fixed tokens, all but the first, without touching any prefix cache; before every
        user's request. For `begin`."""
        prompt = tokens_input([(37 * i + 11) % vocab_size for i in range(size)])
        params = VllmParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        name = "probe" if lora is None else f"probe-{lora.lora_int_id}"
        flat: Any = None
        async for output in self._engine.generate(prompt, params, name, lora_request=lora, priority=PROBE_PRIORITY):
            flat = output.prompt_logprobs
        return list(flat.logprobs)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """It goes on whenever the loop runs, beside the requests."""
        return self._loop.create_task(work)

    def is_done(self, task: asyncio.Task[Any], limit_s: float) -> bool:
        """Waits at most `limit_s` for it."""
        self._run(asyncio.wait({task}, timeout=limit_s))
        return task.done()

    def cancel(self, task: asyncio.Task[Any]) -> None:
        """vLLM has heard of it when this returns."""
        task.cancel()
        self._run(asyncio.wait({task}))

    @property
    def is_lost(self) -> bool:
        return bool(self._engine.errored)

    def check_alive(self) -> None:
        """Raise EngineCoreLost when the engine core is dead, or has made no step for long although it has work."""
        if self.is_lost:
            raise EngineCoreLost(CORE_DIED)
        silence_s = time.monotonic() - self.progress.last_step
        if silence_s > HUNG_AFTER_S:
            raise EngineCoreLost(f"vLLM's engine core has made no step for {silence_s:.0f} s")

    def close(self) -> None:
        """Ends the engine core and its workers."""
        self._engine.shutdown(timeout=SHUTDOWN_S)
        self._run(self._end_tasks())
        self._loop.close()
        del self._engine  # its own destructor would run when Python has taken itself apart already

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Also on a thread that runs another loop, as the engine's main thread does at its start and end."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._loop.run_until_complete(work)
        with ThreadPoolExecutor(1) as helper:
            return helper.submit(self._loop.run_until_complete, work).result()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, config: Any) -> AsyncLLM:
        """In the loop, so that vLLM's background tasks find it."""
        return AsyncLLM.from_vllm_config(
            config,
            stat_loggers=[lambda _, index: ProgressLogger(self.progress, index), VllmMetrics],
            disable_log_stats=False,
        )

    def _try_out(self) -> None:
        """Kernels that cannot compute this model show it only now, and would take the engine core down later."""
        try:
            self._run(self.score(2, self.config.model_config.get_vocab_size(), None))
        except EngineDeadError as error:
            self.close()
            raise EngineCoreLost("vLLM cannot compute this model; its log lines above say why") from error

    async def _add(self, sequences: Seq[Sequence], model: ModelInfo, lora: LoRARequest | None) -> None:
        for sequence in sequences:
            request = sequence.request
            try:
                collector = await self._engine.add_request(
                    "-".join(map(str, sequence.key)),
                    tokens_input(request.prompt_token_ids, cache_salt=request.cache_salt or None),
                    vllm_params(request, sequence.index, model),
                    lora_request=lora,
                    priority=request.priority,
                )
            except (ValueError, VLLMClientError) as error:  # the latter is no ValueError
                raise RequestRefused("invalid_request", str(error)) from error
            sequence.vllm_id = collector.request_id
            self._redirect(collector, sequence)

    def _redirect(self, collector: Any, sequence: Sequence) -> None:
        """Outputs go to the sequence directly: a task per request, waiting on its collector, costs twice as much."""
        state = self._engine.output_processor.request_states.get(sequence.vllm_id)
        if state is not None:
            state.queue = sequence
        if collector.output is not None:  # it came while the request was being sent
            sequence.put(collector.output)

    async def _wait(self, limit_s: float) -> None:
        self._news = self._loop.create_future()
        if self._is_interrupted:
            limit_s = 0
        timer = self._loop.call_later(limit_s, self.wake)
        try:
            await self._news
        finally:
            timer.cancel()
            self._news = None
            self._is_interrupted = False
