"""vLLM as a backend: token ids in and out, its own text side left out.

`step` takes what vLLM's engine core, a process of its own, has computed meanwhile. Deadlines are kept here, as vLLM
has none. Each choice of a request is one of vLLM's requests, as vLLM itself does it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.engine.backends.admission import check_request
from server.engine.backends.base import AdapterError, RequestRefused, no_effect, not_a_number, unheard
from server.engine.backends.stop_ids import read_stop_ids
from server.engine.backends.vllm.options import VllmOptions
from server.engine.backends.vllm.sequence import Sequence
from server.engine.messages import AdapterInfo, EngineStats, FinishReason, Generate, ModelInfo, SequenceOutput
from server.store.hashes import weights_hash
from server.store.model_folder import read_model_config

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

log = logging.getLogger("qloop.engine")

STEP_WAIT_S = 0.1  # a step without news returns after this, so that heartbeats are never late
PROBE_SIZE = 16  # tokens
FIRST_PROBE_S = 0.3  # an idle engine is done by then
LATER_PROBE_S = 0.02  # a look
MUCH = 0.25  # nat: no batch's rounding changes a log probability by this much
UNSUPPORTED = ("num_beams", "no_repeat_ngram_size")  # the hf backend has both


class VllmBackend:
    """Implements `Backend` over vLLM 0.32."""

    def __init__(self, options: VllmOptions) -> None:
        self._options = options
        self._live: dict[tuple[str, int], Sequence] = {}
        self._news: list[SequenceOutput] = []
        self._failure: Exception | None = None
        self._loras: dict[str, LoRARequest] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}  # by adapter id; vLLM computes them between everything else
        self._base_scores: list[float] = []  # of the last time that the base was probed
        self._prompt_tokens = self._generated_tokens = self._num_aborted = self._cached_tokens = 0

    def load(self, enter: Callable[[str], None] = unheard) -> ModelInfo:
        options = self._options
        config = read_model_config(options.model_path)
        enter("hashing the weights")
        hash_of_weights = weights_hash(options.model_path, cache_path=options.hash_cache_path)
        enter("importing vLLM")
        from server.engine.backends.vllm.arguments import weights_type
        from server.engine.backends.vllm.lora import model_shape_of
        from server.engine.backends.vllm.runtime import Runtime

        log.info("starting vLLM's engine core for %s", options.model_path)
        enter("vLLM loads the weights")
        self._runtime = Runtime(options)
        vllm = self._runtime.config
        max_model_len = int(vllm.model_config.max_model_len)
        self._shape = model_shape_of(options.model_path, max_model_len, options.trust_remote_code)
        self.model = ModelInfo(
            name=options.served_name,
            path=str(options.model_path),
            backend="vllm",
            dtype=weights_type(vllm.model_config),
            max_model_len=max_model_len,
            vocab_size=int(vllm.model_config.get_vocab_size()),
            stop_token_ids=read_stop_ids(options.model_path, config),
            max_num_seqs=int(vllm.scheduler_config.max_num_seqs),
            max_logprobs=options.max_logprobs,
            kv_cache_tokens=int(vllm.cache_config.num_gpu_blocks or 0) * int(vllm.cache_config.block_size),
            weights_hash=hash_of_weights,
            unsupported_params=UNSUPPORTED,
            has_metrics=True,
            max_adapter_rank=options.max_lora_rank,
        )
        return self.model

    def check(self, request: Generate) -> None:
        check_request(request, self.model, self._loras)
        self._runtime.check(request, self.model)

    def add(self, request: Generate) -> None:
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        lora = None if request.adapter is None else self._loras[request.adapter]
        sequences = [Sequence(request, index, deadline, self._receive) for index in range(request.n)]
        if not self._live:
            self._runtime.progress.last_step = time.monotonic()  # it had no reason to make one before
        self._live.update((sequence.key, sequence) for sequence in sequences)
        try:
            self._runtime.add(sequences, self.model, lora)
        except RequestRefused:
            self.abort(request.request_id)
            raise

    def abort(self, request_id: str, index: int | None = None) -> None:
        gone = self._take_out(self._matching(lambda s: _is_of(s.request.request_id, s.index, request_id, index)))
        # Also of those that have finished in vLLM's loop meanwhile, and are not known here any more.
        self._news = [news for news in self._news if not _is_of(news.request_id, news.index, request_id, index)]
        self._num_aborted += len(gone)

    def step(self) -> list[SequenceOutput]:
        news = [*self._take_news(), *self._expire()]
        if self._live and not news:
            self._runtime.wait(self._patience())
        if self._failure is not None:
            raise self._failure
        if self._live or self._runtime.is_lost:
            self._runtime.check_alive()
        return news + self._take_news()

    def interrupt(self) -> None:
        self._runtime.interrupt()

    @property
    def has_work(self) -> bool:
        """Also when the engine core died idle: then the next step says so."""
        return bool(self._live or self._news) or self._runtime.is_lost

    @property
    def stats(self) -> EngineStats:
        progress, total = self._runtime.progress, self.model.kv_cache_tokens
        num_started = sum(sequence.has_started for sequence in self._live.values())
        num_running = min(max(num_started, progress.num_running), len(self._live))
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._live) - num_running,
            kv_tokens_used=round(progress.mean_kv_usage * total) if self._live else 0,
            kv_tokens_total=total,
            num_steps=progress.num_steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            num_aborted=self._num_aborted,
            num_preempted=progress.num_preempted,
            cached_tokens_total=self._cached_tokens,
        )

    def metrics(self) -> str:
        from server.engine.backends.vllm.metrics import exposition

        return exposition()

    def load_adapter(self, adapter: AdapterInfo, path: Path) -> None:
        from server.engine.backends.vllm.lora import check_adapter

        if not self._options.max_loras:
            raise AdapterError("this engine was started without adapters. Restart it with QLOOP_VLLM_ENABLE_LORA=true.")
        check_adapter(path, self._shape, self._options.max_lora_rank)
        try:
            # vLLM knows prefixes by name: with the number in it, they never outlive the weights.
            name = f"{adapter.id}#{adapter.int_id}"
            self._loras[adapter.id] = self._runtime.add_lora(name, adapter.int_id, path)
        except Exception as error:
            if self._runtime.is_lost:
                raise
            raise AdapterError(f"{path}: vLLM cannot load it: {error}") from error

    def probe_adapter(self, adapter_id: str) -> bool:
        """Compares the log probabilities of a few fixed tokens with and without it.

        With every slot taken vLLM may come to it only after many steps, and outputs must not wait for it.
        """
        probe = self._probes.get(adapter_id)
        patience_s = LATER_PROBE_S if probe else FIRST_PROBE_S
        if probe is None:
            probe = self._probes[adapter_id] = self._runtime.begin(self._probe(self._loras[adapter_id]))
        if not self._runtime.is_done(probe, patience_s):
            return False
        self._probes.pop(adapter_id).result()
        return True

    async def _probe(self, lora: "LoRARequest") -> None:
        """Raises AdapterError."""
        found = await self._score(lora)
        if any(map(math.isnan, found)):
            raise not_a_number()
        if self._base_scores and _differ(found, self._base_scores):
            return
        self._base_scores = await self._score(None)
        if found == self._base_scores:
            raise no_effect(self.model.dtype)

    async def _score(self, lora: "LoRARequest | None") -> list[float]:
        return await self._runtime.score(PROBE_SIZE, self.model.vocab_size, lora)

    def unload_adapter(self, adapter_id: str) -> None:
        if (probe := self._probes.pop(adapter_id, None)) is not None:
            self._runtime.cancel(probe)
        lora = self._loras.pop(adapter_id, None)
        if lora is not None:
            self._runtime.remove_lora(lora)

    def close(self) -> None:
        self._live.clear()
        self._runtime.close()

    def _receive(self, sequence: Sequence, output: "RequestOutput | Exception") -> None:
        """Called in vLLM's event loop, which runs only while this backend waits for it."""
        if isinstance(output, Exception):
            self._failure = output
        elif sequence.key in self._live:
            self._count(sequence, output)
            news = sequence.news(output)
            self._news.append(news)
            self._generated_tokens += len(news.new_token_ids)
            if news.finish_reason is not None:
                self._forget(sequence)
        self._runtime.wake()

    def _count(self, sequence: Sequence, output: "RequestOutput") -> None:
        if not sequence.has_started:
            self._prompt_tokens += len(sequence.request.prompt_token_ids)
            self._cached_tokens += output.num_cached_tokens or 0

    def _patience(self) -> float:
        """Until the next deadline at most."""
        deadlines = [s.deadline for s in self._live.values() if s.deadline is not None]
        return min(STEP_WAIT_S, max(min(deadlines) - time.monotonic(), 0)) if deadlines else STEP_WAIT_S

    def _take_news(self) -> list[SequenceOutput]:
        news, self._news = self._news, []
        return news

    def _expire(self) -> list[SequenceOutput]:
        now = time.monotonic()
        late = self._take_out(self._matching(lambda s: s.deadline is not None and s.deadline <= now))
        return [sequence.end(FinishReason.DEADLINE) for sequence in late]

    def _matching(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        return [sequence for sequence in self._live.values() if matches(sequence)]

    def _take_out(self, sequences: list[Sequence]) -> list[Sequence]:
        """Free sequences that vLLM still computes; nothing comes from them any more."""
        for sequence in sequences:
            self._forget(sequence)
        known = [sequence for sequence in sequences if sequence.vllm_id]
        if known:
            self._runtime.abort(known)
        return sequences

    def _forget(self, sequence: Sequence) -> None:
        self._live.pop(sequence.key, None)
        if not self._live:
            self._runtime.progress.running.clear()  # what it says next is of requests yet to come


def _is_of(request_id: str, index: int, wanted_id: str, wanted_index: int | None) -> bool:
    return request_id == wanted_id and wanted_index in (None, index)


def _differ(found: list[float], before: list[float]) -> bool:
    """Far enough that the base need not be probed again beside the same running requests, which costs a step."""
    return any(abs(new - old) > MUCH for new, old in zip(found, before, strict=True))
