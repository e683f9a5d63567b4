"""Continuous batching over a transformers model: sequences join and leave the batch at every step.

The step loop is `HfBackend.step`: `Scheduler.plan` says how many tokens of which sequence come next, `Batch` lays them
side by side, the network computes them in one pass, `_advance` chooses the next tokens. Knows nothing about sockets or
text. Everything runs on the caller's one thread.
"""

import functools
import gc
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import torch
from torch import Tensor

from server.engine.backends.admission import check_request
from server.engine.backends.base import AdapterError, RequestRefused, no_effect, not_a_number, unheard
from server.engine.backends.hf.adapter_files import read_adapter, with_cells
from server.engine.backends.hf.adapters import LoadedAdapters
from server.engine.backends.hf.batch import Batch, Part
from server.engine.backends.hf.beam_rows import BeamRows
from server.engine.backends.hf.kv_store import KvStore
from server.engine.backends.hf.load import load_network
from server.engine.backends.hf.logprobs import token_logprobs
from server.engine.backends.hf.memory import return_freed_memory
from server.engine.backends.hf.options import HfOptions
from server.engine.backends.hf.probe import PROBE_TOKENS, check_network, measured_budget, probe_ids, probe_logits
from server.engine.backends.hf.rows import KvRows
from server.engine.backends.hf.sampler import choose
from server.engine.backends.hf.scheduler import Chunk, Scheduler
from server.engine.backends.hf.sequence import Sequence
from server.engine.backends.stop_ids import read_stop_ids
from server.engine.messages import AdapterInfo, EngineStats, FinishReason, Generate, ModelInfo, SequenceOutput
from server.store.hashes import weights_hash
from server.store.model_folder import read_model_config

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
NOT_A_NUMBER = "The model's output is not a number (NaN or infinity). Check the weights, the adapter and the dtype."
NOTHING_LEFT = "Bans and biases leave no token that could come next, or the model's output is not a number."


def _out_of_memory_is_its_fault(method: Callable[P, T]) -> Callable[P, T]:
    """For what is done with an adapter: the engine and everything that runs go on without it."""

    @functools.wraps(method)
    def guarded(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return method(*arguments, **options)
        except MEMORY_ERRORS as error:
            return_freed_memory()
            raise AdapterError(f"it does not fit into this engine's memory beside the others ({error})") from None

    return guarded


class HfBackend:
    """Implements `Backend` for decoders of transformers with full or sliding-window attention."""

    def __init__(self, options: HfOptions) -> None:
        self._options = options
        self._num_steps = self._prompt_tokens = self._generated_tokens = self._num_aborted = self._cached_tokens = 0

    @torch.inference_mode()
    def load(self, enter: Callable[[str], None] = unheard) -> ModelInfo:
        options = self._options
        enter("loading the weights")
        loaded = load_network(options)
        enter("hashing the weights")
        hash_of_weights = weights_hash(options.model_path, cache_path=options.hash_cache_path)
        enter("trying out the model")
        network, shape = loaded.network, loaded.network.shape
        self._store = KvStore(shape, loaded.num_rows + 1, max(loaded.max_model_len, PROBE_TOKENS))
        self._scratch_row = loaded.num_rows
        check_network(network, self._store, loaded.expected_logits, self._scratch_row, options.dtype == "int8")
        budget = measured_budget(network, self._store, self._scratch_row, options.prefill_chunk, loaded.max_model_len)
        log.info("prompt tokens per step: %d; while others stream: %d, or %d for few (half at %d cells)", *budget)
        self._network, self._modules = network, loaded.modules
        self._adapters = LoadedAdapters(network.projections)
        self._rows = KvRows(self._store, loaded.num_rows, loaded.max_cells, options.max_num_seqs, options.prefix_cache)
        self._scheduler = Scheduler(self._rows, budget)
        self._beams: dict[str, BeamRows] = {}
        self.model = ModelInfo(
            name=options.served_name,
            path=str(options.model_path),
            backend="hf",
            dtype=loaded.dtype,
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.expected_logits.shape[1],
            stop_token_ids=read_stop_ids(options.model_path, read_model_config(options.model_path)),
            max_num_seqs=options.max_num_seqs,
            max_logprobs=options.max_logprobs,
            kv_cache_tokens=loaded.max_cells,
            weights_hash=hash_of_weights,
        )
        return self.model

    def check(self, request: Generate) -> None:
        check_request(request, self.model, self._adapters.slots)
        cells = self._num_virtual(request) + len(request.prompt_token_ids) + request.params.max_tokens
        if cells > self.model.max_model_len:
            raise RequestRefused(
                "context_length_exceeded",
                f"This model's maximum context length is {self.model.max_model_len} tokens. However, the adapter's "
                f"{self._num_virtual(request)} virtual tokens, the prompt and max_tokens come to {cells}.",
            )
        beams = request.params.num_beams
        if beams > 1 and not self._rows.could_hold(beams, cells):
            raise RequestRefused(
                "invalid_request",
                f"{beams} beams of {cells} tokens do not fit into this engine's KV cache ({self.model.kv_cache_tokens} "
                f"tokens, {self.model.max_num_seqs} sequences). Lower num_beams or max_tokens.",
                "num_beams",
            )

    def add(self, request: Generate) -> None:
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        model_stops = () if request.params.ignore_eos else self.model.stop_token_ids
        stop_ids = frozenset((*request.params.stop_token_ids, *model_stops))
        slot = -1 if request.adapter is None else self._adapters.slots[request.adapter]
        cells = None if slot < 0 else self._adapters.cells(slot)
        beams = request.params.num_beams
        made = [Sequence(request, i, stop_ids, deadline, slot, cells) for i in range(max(request.n, beams))]
        if beams > 1:
            first, *first.other_beams = made
            self._beams[request.request_id] = BeamRows(first)
            made = [first]
        for sequence in made:
            self._scheduler.add(sequence)

    @torch.inference_mode()
    def abort(self, request_id: str, index: int | None = None) -> None:
        if request_id in self._beams and index is not None:
            return  # choices are drawn from all beams at the end

        def matches(sequence: Sequence) -> bool:
            return sequence.request.request_id == request_id and index in (None, sequence.index)

        self._num_aborted += len(self._take_out(matches))

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        if not self.has_work:
            return []
        self._num_steps += 1
        outputs = self._expire()
        chunks = self._scheduler.plan()
        if chunks:
            batch = Batch([_part(chunk) for chunk in chunks], self._store)
            chunks = [chunks[place] for place in batch.order]
            try:
                logits = self._network.forward(batch)
            except MEMORY_ERRORS as error:
                return outputs + self._give_up(chunks, error)
            outputs += self._advance(chunks, logits)
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running) or len(self._scheduler.waiting) > 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_tokens_used=self._rows.live_cells,
            kv_tokens_total=self.model.kv_cache_tokens,
            num_steps=self._num_steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            num_aborted=self._num_aborted,
            num_preempted=self._scheduler.num_preempted,
            cached_tokens_total=self._cached_tokens,
        )

    @torch.inference_mode()
    @_out_of_memory_is_its_fault
    def load_adapter(self, adapter: AdapterInfo, path: Path) -> None:
        weights = read_adapter(path, self._modules)
        if weights.embeddings is not None:
            weights = with_cells(weights, self._cells_of(weights.embeddings))
        self._adapters.attach(adapter.id, weights)

    @torch.inference_mode()
    @_out_of_memory_is_its_fault
    def probe_adapter(self, adapter_id: str) -> bool:
        """Compares the logits of a few fixed tokens, which no sequence sees."""
        slot = self._adapters.slots[adapter_id]
        cells, without = self._adapters.cells(slot), Part(self._scratch_row, 0, probe_ids(self.model.vocab_size))
        found = probe_logits(self._network, self._store, replace(without, slot=slot), cells)
        if not found.isfinite().all():
            raise not_a_number()
        if torch.equal(found, probe_logits(self._network, self._store, without, None)):
            raise no_effect(self.model.dtype)
        return True

    @torch.inference_mode()
    def unload_adapter(self, adapter_id: str) -> None:
        self._rows.forget(adapter_id)
        self._adapters.detach(adapter_id)
        return_freed_memory()

    def close(self) -> None:
        """Drop the weights; the backend cannot be used afterwards."""
        del self._network, self._store, self._rows, self._scheduler, self._adapters
        gc.collect()  # modules refer to each other in cycles
        return_freed_memory()

    def _advance(self, chunks: Seq[Chunk], logits: Tensor) -> list[SequenceOutput]:
        """Record what was computed; sequences whose text is now complete in the store get their next token."""
        ready: list[Sequence] = []
        places: list[int] = []
        end = 0
        for sequence, count in chunks:
            start, end = end, end + (count if sequence.wants_prompt_logprobs else 1)
            if sequence.wants_prompt_logprobs:
                self._score_prompt(sequence, logits[start:end])
            self._prompt_tokens += count if sequence.is_prefilling else 0
            sequence.num_cached += count
            if sequence.num_todo == 0:
                ready += [sequence] if sequence.output else [sequence, *self._scheduler.join(sequence)]
                places += [end - 1] * (len(ready) - len(places))
        outputs = self._advance_beams(ready, places, logits) if self._beams else []
        chosen = [i for i, sequence in enumerate(ready) if not sequence.is_beam]
        if [places[i] for i in chosen] != list(range(len(logits))):  # else nothing need be copied
            logits = logits[[places[i] for i in chosen]]
        return outputs + self._choose([ready[i] for i in chosen], logits)

    def _choose(self, sequences: Seq[Sequence], logits: Tensor) -> list[SequenceOutput]:
        """One token for each row of `logits` (`[B, V]`); finished sequences leave."""
        if not sequences:
            return []
        ids = choose(logits, sequences)
        outputs = []
        for sequence, token_id in zip(sequences, ids, strict=True):
            if token_id is None:
                outputs.append(_failed(sequence, NOTHING_LEFT if sequence.history.edits_logits else NOT_A_NUMBER))
            elif sequence.params.max_tokens == 0:
                outputs.append(sequence.news([], FinishReason.LENGTH))
            else:
                outputs.append(sequence.accept(token_id))
                self._generated_tokens += 1
        _add_logprobs(outputs, sequences, logits)
        for sequence, output in zip(sequences, outputs, strict=True):
            if output.num_cached_tokens:
                self._cached_tokens += output.num_cached_tokens
            if output.finish_reason is not None:
                self._scheduler.remove(sequence, keep=output.error is None)
        return outputs

    def _advance_beams(self, ready: Seq[Sequence], places: Seq[int], logits: Tensor) -> list[SequenceOutput]:
        """One token for every beam of every search that is ready."""
        outputs: list[SequenceOutput] = []
        place_of = {id(sequence): place for sequence, place in zip(ready, places, strict=True)}
        for request_id, beams in list(self._beams.items()):
            if id(beams.sequences[0]) not in place_of:
                continue
            self._generated_tokens += len(beams.sequences)
            own = logits[[place_of[id(sequence)] for sequence in beams.sequences]]
            news = beams.advance(own, self._scheduler)
            if news:
                outputs += news
                self._end_beams(request_id)
        return outputs

    def _score_prompt(self, sequence: Sequence, logits: Tensor) -> None:
        """Logprobs of the prompt's tokens that these logits, of the positions before them, predict."""
        if sequence.prompt_logprobs is None:
            sequence.prompt_logprobs = [None]
        start = sequence.num_cached - sequence.num_virtual
        followers = sequence.prompt[start + 1 : start + 1 + logits.shape[0]]
        if followers:
            counts = [sequence.params.prompt_logprobs or 0] * len(followers)
            nothing: list[tuple[int, ...]] = [()] * len(followers)
            sequence.prompt_logprobs += token_logprobs(logits[: len(followers)], followers, counts, nothing)

    def _give_up(self, chunks: Seq[Chunk], error: BaseException) -> list[SequenceOutput]:
        """A step ran out of memory: the sequence that asked most of it fails, the others try again."""
        worst = max(chunks, key=lambda chunk: (chunk.num_tokens, chunk.sequence.num_cached)).sequence
        log.error("out of memory in a step of %d sequences; the largest fails: %s", len(chunks), error)
        return_freed_memory()
        text = "The engine ran out of memory computing this request. Shorten it, or lower QLOOP_MAX_NUM_SEQS."
        failed = _failed(worst, text)
        if worst.is_beam:  # its choices would have been drawn from all beams
            self._end_beams(worst.request.request_id)
            return [msgspec.structs.replace(failed, index=index) for index in range(worst.request.n)]
        self._scheduler.remove(worst, keep=False)
        return [failed]

    def _expire(self) -> list[SequenceOutput]:
        now = time.monotonic()
        late = self._take_out(lambda sequence: sequence.deadline is not None and sequence.deadline <= now)
        return [sequence.news([], FinishReason.DEADLINE) for sequence in late]

    def _take_out(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        """Free every sequence that matches, waiting or running; of a beam search all beams, and it counts once."""
        taken = self._scheduler.waiting.remove(matches)
        for sequence in [s for s in self._scheduler.running if matches(s)]:
            if not sequence.is_beam:
                self._scheduler.remove(sequence, keep=True)
            elif sequence.request.request_id not in self._beams:
                continue  # went with an earlier beam
            else:
                self._end_beams(sequence.request.request_id)
            taken.append(sequence)
        for sequence in taken:
            self._beams.pop(sequence.request.request_id, None)
        return taken

    def _end_beams(self, request_id: str) -> None:
        for sequence in self._beams.pop(request_id).all:
            self._scheduler.remove(sequence, keep=False)

    def _num_virtual(self, request: Generate) -> int:
        return 0 if request.adapter is None else self._adapters.num_virtual(self._adapters.slots[request.adapter])

    def _cells_of(self, embeddings: Tensor) -> Tensor:
        """The KV cells of virtual tokens: attention is causal, so they depend on nothing that comes after them."""
        length = len(embeddings)
        self._network.embed_virtual(embeddings, Batch([Part(self._scratch_row, 0, [0] * length)], self._store))
        cells = self._store.take(self._scratch_row, length)
        self._store.trim(self._scratch_row, 0, length)
        return cells


def _part(chunk: Chunk) -> Part:
    sequence = chunk.sequence
    start = sequence.num_cached - sequence.num_virtual
    tokens = sequence.tokens[start : start + chunk.num_tokens]
    return Part(sequence.row, sequence.num_cached, tokens, sequence.adapter_slot, sequence.wants_prompt_logprobs)


def _add_logprobs(outputs: Seq[SequenceOutput], sequences: Seq[Sequence], logits: Tensor) -> None:
    asking = [row for row, s in enumerate(sequences) if s.wants_logprobs and outputs[row].new_token_ids]
    if asking:
        params = [sequences[row].params for row in asking]
        chosen = [sequences[row].output[-1] for row in asking]
        counts, given = [p.logprobs or 0 for p in params], [p.logprob_token_ids for p in params]
        for row, entry in zip(asking, token_logprobs(logits[asking], chosen, counts, given), strict=True):
            outputs[row].logprobs = [entry]


def _failed(sequence: Sequence, error: str) -> SequenceOutput:
    output = sequence.news([], FinishReason.ERROR)
    output.error = error
    return output
