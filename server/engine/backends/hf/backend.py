"""Continuous batching over a transformers model: sequences join and leave the batch at every step.

One step is: end what is too late, one new token for every decoding sequence, then a bounded amount of prefill. Knows
nothing about sockets or text. Everything runs on the caller's one thread.
"""

import gc
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.engine.backends.admission import check_request
from server.engine.backends.hf.kv_cache import SlotCache
from server.engine.backends.hf.load import context_limit, kv_shape, load_model
from server.engine.backends.hf.logprobs import token_logprobs
from server.engine.backends.hf.lora import LoraLayers
from server.engine.backends.hf.lora_files import read_lora
from server.engine.backends.hf.memory import return_freed_memory
from server.engine.backends.hf.options import HfOptions
from server.engine.backends.hf.sampler import choose
from server.engine.backends.hf.scheduler import Scheduler
from server.engine.backends.hf.sequence import Sequence
from server.engine.backends.stop_ids import read_stop_ids
from server.engine.messages import AdapterInfo, EngineStats, FinishReason, Generate, ModelInfo, SequenceOutput
from server.errors import ConfigError
from server.store.hashes import weights_hash
from server.store.model_folder import read_model_config

SCORING_CHUNK = 64  # prompt tokens per pass when their logits are wanted: bounds [chunk, vocabulary] floats
STEP_S = 0.25  # what a prefill may add to a step: others stream, and the heartbeat comes from between steps
PROBE_TOKENS = 64
PREFILL_COST = 64  # a short prompt costs a step as much as this many tokens, so a step has few passes
IDLE_BYTES = 32 * 2**20  # an idle store above this goes back to the system; a small one waits for the next request
NOT_A_NUMBER = "The model's output is not a number (NaN or infinity). Check the weights, the adapter and the dtype."


class HfBackend:
    """Implements `Backend` for any decoder of transformers with rotary or absolute positions and full attention."""

    def __init__(self, options: HfOptions) -> None:
        self._options = options
        self._num_steps = self._prompt_tokens = self._generated_tokens = self._num_aborted = 0

    @torch.inference_mode()
    def load(self) -> ModelInfo:
        options = self._options
        self._net = load_model(options)
        shape = kv_shape(self._net)
        max_cells = int(options.kv_cache_gib * 2**30) // shape.bytes_per_cell
        if max_cells < 1:
            raise ConfigError(f"kv_cache_gib={options.kv_cache_gib} holds no token of this model. Give it more.")
        own_limit = context_limit(self._net.config)
        self._cache = SlotCache(shape, options.max_num_seqs, max_cells)
        self._scheduler = Scheduler(options.max_num_seqs, max_cells)
        self._lora = LoraLayers(self._net)
        self._prefill_budget = self._measured_prefill_budget()
        self.model = ModelInfo(
            name=options.served_name,
            path=str(options.model_path),
            backend="hf",
            dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[shape.dtype],
            max_model_len=min(own_limit, options.max_model_len or own_limit, max_cells),
            vocab_size=int(self._net.config.vocab_size),
            stop_token_ids=read_stop_ids(options.model_path, read_model_config(options.model_path)),
            max_num_seqs=options.max_num_seqs,
            max_logprobs=options.max_logprobs,
            kv_cache_tokens=max_cells,
            weights_hash=weights_hash(options.model_path, cache_path=options.hash_cache_path),
        )
        return self.model

    def _measured_prefill_budget(self) -> int:
        """Prompt tokens per step that this machine computes in STEP_S, as a power of two, at most `prefill_chunk`.

        Measured once: budgets that changed while running would change rounding, and with it seeded texts.
        """
        tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=self._cache.shape.device)
        for _ in range(2):  # the first pass also allocates and compiles
            start = time.perf_counter()
            self._net(input_ids=tokens, use_cache=False, logits_to_keep=1)
            seconds = time.perf_counter() - start
        affordable = max(int(PROBE_TOKENS * STEP_S / seconds), 1)
        return min(self._options.prefill_chunk, max(1 << (affordable.bit_length() - 1), PROBE_TOKENS // 4))

    def check(self, request: Generate) -> None:
        check_request(request, self.model, self._lora.slots)

    def add(self, request: Generate) -> None:
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        model_stops = () if request.params.ignore_eos else self.model.stop_token_ids
        stop_ids = frozenset((*request.params.stop_token_ids, *model_stops))
        slot = -1 if request.adapter is None else self._lora.slots[request.adapter]
        for index in range(request.n):
            self._scheduler.add(Sequence(request, index, stop_ids, deadline, slot))

    @torch.inference_mode()
    def abort(self, request_id: str, index: int | None = None) -> None:
        def matches(sequence: Sequence) -> bool:
            return sequence.request.request_id == request_id and index in (None, sequence.index)

        self._num_aborted += len(self._take_out(matches))

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        if not self.has_work:
            return []
        self._num_steps += 1
        outputs = self._expire()
        outputs += self._decode()
        outputs += self._prefill()
        self._release_if_idle()
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.live) or len(self._scheduler.waiting) > 0

    @property
    def stats(self) -> EngineStats:
        live = self._scheduler.live
        return EngineStats(
            num_running=len(live),
            num_waiting=len(self._scheduler.waiting),
            kv_tokens_used=len(live) * self._scheduler.longest_reservation,
            kv_tokens_total=self.model.kv_cache_tokens,
            num_steps=self._num_steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            num_aborted=self._num_aborted,
        )

    @torch.inference_mode()
    def load_adapter(self, adapter: AdapterInfo, path: Path) -> None:
        self._lora.attach(adapter.id, read_lora(path, self._net))

    @torch.inference_mode()
    def unload_adapter(self, adapter_id: str) -> None:
        self._lora.detach(adapter_id)
        return_freed_memory()

    def close(self) -> None:
        """Drop the weights; the backend cannot be used afterwards."""
        del self._net, self._cache, self._lora
        gc.collect()  # modules refer to each other in cycles
        return_freed_memory()

    def _expire(self) -> list[SequenceOutput]:
        now = time.monotonic()
        late = self._take_out(lambda sequence: sequence.deadline is not None and sequence.deadline <= now)
        return [sequence.news([], FinishReason.DEADLINE) for sequence in late]

    def _decode(self) -> list[SequenceOutput]:
        """One token for every decoding sequence."""
        sequences = list(self._scheduler.decoding)
        if not sequences:
            return []
        lengths = [sequence.num_cached for sequence in sequences]
        self._reserve(max(lengths) + 1)
        logits = self._forward([[s.output[-1]] for s in sequences], [[length] for length in lengths], sequences, 0)
        for sequence in sequences:
            sequence.num_cached += 1
        return self._advance(logits[:, -1], sequences)

    def _prefill(self) -> list[SequenceOutput]:
        """Prompt tokens within this step's budget, one sequence after the other."""
        outputs: list[SequenceOutput] = []
        budget = self._prefill_budget
        while budget > 0 and (sequence := self._scheduler.next_prefill()) is not None:
            most = min(budget, SCORING_CHUNK) if sequence.wants_prompt_logprobs else budget
            start = sequence.num_cached
            tokens = sequence.prompt[start : start + most]
            logits = self._prefill_chunk(sequence, tokens)
            budget -= max(len(tokens), min(PREFILL_COST, self._prefill_budget))
            if sequence.is_prefilled:
                outputs += self._start_decoding(logits)
        return outputs

    def _prefill_chunk(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        """Compute the next `tokens` of a prompt; the logits after the last one, `[1, V]`."""
        start, end = sequence.num_cached, sequence.num_cached + len(tokens)
        self._reserve(end)
        keep = 0 if sequence.wants_prompt_logprobs else 1
        row = len(self._scheduler.decoding)
        logits = self._forward([tokens], [list(range(start, end))], [sequence], row, keep)
        sequence.num_cached = end
        self._prompt_tokens += len(tokens)
        if sequence.wants_prompt_logprobs:
            self._score_prompt(sequence, logits[0], start)
        return logits[:, -1]

    def _score_prompt(self, sequence: Sequence, logits: Tensor, start: int) -> None:
        """Logprobs of the prompt's tokens after `start`, which the logits of the positions before them predict."""
        if sequence.prompt_logprobs is None:
            sequence.prompt_logprobs = [None]
        followers = sequence.prompt[start + 1 : start + 1 + logits.shape[0]]
        if followers:
            counts = [sequence.params.prompt_logprobs or 0] * len(followers)
            nothing: list[tuple[int, ...]] = [()] * len(followers)
            sequence.prompt_logprobs += token_logprobs(logits[: len(followers)], followers, counts, nothing)

    def _start_decoding(self, logits: Tensor) -> list[SequenceOutput]:
        """The prefilled sequence and the choices that share its prompt get their first token."""
        joined = self._scheduler.finish_prefill()
        first, siblings = joined[0], joined[1:]
        first_row = len(self._scheduler.decoding) - len(joined)
        self._reserve(first.num_cached)
        for offset, sibling in enumerate(siblings, start=1):
            self._cache.copy_row(first_row, first_row + offset, first.num_cached)
            sibling.num_cached = first.num_cached
        if first.params.max_tokens == 0:
            for sequence in joined:
                self._leave(sequence)
            return [sequence.news([], FinishReason.LENGTH) for sequence in joined]
        return self._advance(logits.expand(len(joined), -1), joined)

    def _advance(self, logits: Tensor, sequences: Seq[Sequence]) -> list[SequenceOutput]:
        """Choose and record one token per row of `logits` (`[B, V]`); finished sequences leave."""
        ids = choose(logits, sequences)
        outputs = [
            _failed(sequence) if token_id is None else sequence.accept(token_id)
            for sequence, token_id in zip(sequences, ids, strict=True)
        ]
        self._generated_tokens += sum(token_id is not None for token_id in ids)
        asking = [row for row, s in enumerate(sequences) if s.wants_logprobs and ids[row] is not None]
        if asking:
            params = [sequences[row].params for row in asking]
            chosen = [sequences[row].output[-1] for row in asking]
            counts, given = [p.logprobs or 0 for p in params], [p.logprob_token_ids for p in params]
            for row, entry in zip(asking, token_logprobs(logits[asking], chosen, counts, given), strict=True):
                outputs[row].logprobs = [entry]
        for sequence, output in zip(sequences, outputs, strict=True):
            if output.finish_reason is not None:
                self._leave(sequence)
        return outputs

    def _forward(
        self, tokens: list[list[int]], positions: list[list[int]], sequences: Seq[Sequence], row: int, keep: int = 1
    ) -> Tensor:
        """Logits `[B, keep, V]` (all positions for keep=0) of `[B, q]` tokens in cache rows `row ..`."""
        device = self._cache.shape.device
        position_ids = torch.tensor(positions, device=device)
        span = self._cache.set_span(row, position_ids, 1 + max(max(row_positions) for row_positions in positions))
        self._lora.set_rows([sequence.adapter_slot for sequence in sequences])
        result: Any = self._net(
            input_ids=torch.tensor(tokens, device=device),
            position_ids=position_ids,
            attention_mask=span.mask(),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = result.logits
        return logits

    def _reserve(self, cells: int) -> None:
        self._cache.reserve(len(self._scheduler.live), cells, self._scheduler.longest_reservation)

    def _take_out(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        """Free every sequence that matches, waiting or live."""
        taken = self._scheduler.waiting.remove(matches)
        for sequence in self._scheduler.matching(matches):
            self._leave(sequence)
            taken.append(sequence)
        self._release_if_idle()
        return taken

    def _leave(self, sequence: Sequence) -> None:
        self._cache.clear_row(self._scheduler.row_of(sequence), sequence.num_cached)
        for source, target, length in self._scheduler.remove(sequence):
            self._cache.move_row(source, target, length)

    def _release_if_idle(self) -> None:
        if self._cache.num_bytes > IDLE_BYTES and not self.has_work:
            self._cache.release()
            return_freed_memory()


def _failed(sequence: Sequence) -> SequenceOutput:
    output = sequence.news([], FinishReason.ERROR)
    output.error = NOT_A_NUMBER
    return output
