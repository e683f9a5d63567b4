"""A backend without a model: every sequence echoes its own prompt, at a settable pace.

It ships with the product for front-end tests and benchmarks: whatever text is in the prompt comes back, so a test
drives any output it likes. Needs `config.json` (and `tokenizer.json`, where there is one, to leave control tokens
out) and no weights. It obeys lengths, stop ids, deadlines, priorities and logprob counts, invents the logprobs, and
does not sample: temperature, penalties, bias and seed change nothing. No prefix is ever cached, and it says so.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.engine.backends.admission import check_request
from server.engine.backends.base import AdapterError, unheard
from server.engine.backends.stop_ids import read_stop_ids
from server.engine.backends.waiting import WaitingQueue
from server.engine.messages import (
    AdapterInfo,
    EngineStats,
    FinishReason,
    Generate,
    ModelInfo,
    SequenceOutput,
    TokenLogprobs,
)
from server.errors import ConfigError
from server.store.model_folder import read_model_config
from server.text.tokenizer_file import read_added_tokens

LONGEST_SLEEP_S = 0.01  # a step returns at least this often, so aborts and heartbeats are never late
MAX_LATER = 7  # adapters' echoes start this many tokens after the base's, at most
MAX_CATCH_UP_S = 1.0  # after a pause of the whole process, this much of the schedule is made up for


@dataclass(frozen=True)
class FakeOptions:
    model_path: Path
    served_name: str
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_logprobs: int = 20
    tokens_per_s: float = 0.0  # per sequence; 0 is one token per step, as fast as steps are called


@dataclass(eq=False, slots=True)
class _Sequence:
    request: Generate
    index: int
    echo: list[int]
    stop_ids: frozenset[int]
    deadline: float | None
    num_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None)


class FakeBackend:
    def __init__(self, options: FakeOptions) -> None:
        self._options = options
        self._model: ModelInfo | None = None
        self._skipped_ids: frozenset[int] = frozenset()
        self._filler_id = 0
        self._adapters: dict[str, int] = {}  # id -> by how many tokens its echo starts later than the base's
        self._waiting: WaitingQueue[_Sequence] = WaitingQueue()
        self._running: list[_Sequence] = []
        self._tick_at = 0.0
        self._num_steps = self._prompt_tokens = self._generated_tokens = self._num_aborted = 0

    def load(self, enter: Callable[[str], None] = unheard) -> ModelInfo:
        options = self._options
        config = read_model_config(options.model_path)
        vocab_size, context = config.get("vocab_size"), config.get("max_position_embeddings")
        if not isinstance(vocab_size, int) or not isinstance(context, int):
            raise ConfigError(
                f"{options.model_path / 'config.json'} has no vocab_size or max_position_embeddings. "
                "Name the folder of a causal language model."
            )
        stop_ids = read_stop_ids(options.model_path, config)
        self._skipped_ids = _control_ids(options.model_path) | frozenset(stop_ids)
        self._filler_id = next((i for i in range(vocab_size) if i not in self._skipped_ids), 0)
        max_model_len = min(context, options.max_model_len or context)
        self._model = ModelInfo(
            name=options.served_name,
            path=str(options.model_path),
            backend="fake",
            dtype="none",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            stop_token_ids=stop_ids,
            max_num_seqs=options.max_num_seqs,
            max_logprobs=options.max_logprobs,
            kv_cache_tokens=max_model_len * options.max_num_seqs,
            weights_hash="fake",
            unsupported_params=("num_beams", "no_repeat_ngram_size"),
        )
        return self._model

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "load() comes first"
        return self._model

    def check(self, request: Generate) -> None:
        check_request(request, self.model, self._adapters)

    def add(self, request: Generate) -> None:
        if not self.has_work:
            self._tick_at = time.monotonic() + self._tick_s
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        model_stops = () if request.params.ignore_eos else self.model.stop_token_ids
        stop_ids = frozenset((*request.params.stop_token_ids, *model_stops))
        plain = [i for i in request.prompt_token_ids if i not in self._skipped_ids] or [self._filler_id]
        later = 0 if request.adapter is None else self._adapters[request.adapter]
        for index in range(request.n):
            shift = (index + later) % len(plain)
            echo = plain[shift:] + plain[:shift]
            self._waiting.push(request.priority, _Sequence(request, index, echo, stop_ids, deadline))

    def abort(self, request_id: str, index: int | None = None) -> None:
        def matches(sequence: _Sequence) -> bool:
            return sequence.request.request_id == request_id and index in (None, sequence.index)

        gone = self._waiting.remove(matches) + [sequence for sequence in self._running if matches(sequence)]
        self._running = [sequence for sequence in self._running if not matches(sequence)]
        self._num_aborted += len(gone)

    def step(self) -> list[SequenceOutput]:
        if not self.has_work:
            return []
        outputs = self._expire()
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            self._start(self._waiting.pop())
        if not self._is_time():
            return outputs
        self._num_steps += 1
        outputs += [self._advance(sequence) for sequence in self._running]
        finished = {(o.request_id, o.index) for o in outputs if o.finish_reason is not None}
        if finished:
            self._running = [s for s in self._running if (s.request.request_id, s.index) not in finished]
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._waiting) > 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_tokens_used=sum(len(s.request.prompt_token_ids) + s.num_tokens for s in self._running),
            kv_tokens_total=self.model.kv_cache_tokens,
            num_steps=self._num_steps,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            num_aborted=self._num_aborted,
        )

    def load_adapter(self, adapter: AdapterInfo, path: Path) -> None:
        """Any folder with an `adapter_config.json` will do; its weights decide how much later its echo starts."""
        if not (path / "adapter_config.json").is_file():
            raise AdapterError(f"{path} has no adapter_config.json. Name the folder that the trainer wrote.")
        weights = path / "adapter_model.safetensors"
        self._adapters[adapter.id] = 1 + zlib.crc32(weights.read_bytes() if weights.is_file() else b"") % MAX_LATER

    def unload_adapter(self, adapter_id: str) -> None:
        self._adapters.pop(adapter_id, None)

    def probe_adapter(self, adapter_id: str) -> bool:
        """There are no numbers that could be wrong, and every adapter starts later than the base."""
        return True

    def close(self) -> None:
        self._running.clear()
        self._waiting = WaitingQueue()

    @property
    def _tick_s(self) -> float:
        rate = self._options.tokens_per_s
        return 1 / rate if rate > 0 else 0.0

    def _is_time(self) -> bool:
        """All sequences advance on one clock, as a real model's batch does. The clock never drifts."""
        if self._tick_s == 0:
            return True
        now = time.monotonic()
        if now < self._tick_at:
            time.sleep(min(self._tick_at - now, LONGEST_SLEEP_S))
            now = time.monotonic()
        if now < self._tick_at:
            return False
        self._tick_at = max(self._tick_at + self._tick_s, now - MAX_CATCH_UP_S)
        return True

    def _start(self, sequence: _Sequence) -> None:
        self._prompt_tokens += len(sequence.request.prompt_token_ids)
        count = sequence.request.params.prompt_logprobs
        if count is not None and sequence.index == 0:
            rest = sequence.request.prompt_token_ids[1:]
            sequence.prompt_logprobs = [None, *(self._logprobs(i, count, ()) for i in rest)]
        self._running.append(sequence)

    def _expire(self) -> list[SequenceOutput]:
        now = time.monotonic()

        def is_late(sequence: _Sequence) -> bool:
            return sequence.deadline is not None and sequence.deadline <= now

        late = self._waiting.remove(is_late) + [sequence for sequence in self._running if is_late(sequence)]
        if late:
            self._running = [sequence for sequence in self._running if not is_late(sequence)]
        return [SequenceOutput(s.request.request_id, s.index, [], s.num_tokens, FinishReason.DEADLINE) for s in late]

    def _advance(self, sequence: _Sequence) -> SequenceOutput:
        """The next token of one sequence, or its end where it may have none."""
        request, params = sequence.request, sequence.request.params
        output = SequenceOutput(request.request_id, sequence.index, [], 0)
        output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        output.num_cached_tokens = 0 if sequence.num_tokens == 0 else None
        if params.max_tokens == 0:
            output.finish_reason = FinishReason.LENGTH
            return output
        token_id = self._next_token(sequence)
        sequence.num_tokens += 1
        self._generated_tokens += 1
        output.new_token_ids, output.num_tokens = [token_id], sequence.num_tokens
        if params.logprobs is not None or params.logprob_token_ids:
            output.logprobs = [self._logprobs(token_id, params.logprobs or 0, params.logprob_token_ids)]
        if token_id in sequence.stop_ids:
            output.finish_reason, output.stop_token_id = FinishReason.STOP, token_id
        elif sequence.num_tokens >= params.max_tokens:
            output.finish_reason = FinishReason.LENGTH
        return output

    def _next_token(self, sequence: _Sequence) -> int:
        params, echo, position = sequence.request.params, sequence.echo, sequence.num_tokens
        may_stop = position >= params.min_tokens
        if may_stop and position >= len(echo) and self.model.stop_token_ids and not params.ignore_eos:
            return self.model.stop_token_ids[0]
        token_id = echo[position % len(echo)]
        if token_id in sequence.stop_ids and not may_stop:
            allowed = [i for i in echo if i not in sequence.stop_ids] or [self._filler_id]
            return allowed[position % len(allowed)]
        return token_id

    def _logprobs(self, token_id: int, count: int, given_ids: tuple[int, ...]) -> TokenLogprobs:
        """Invented, but a sound distribution: the chosen token first, its followers in the vocabulary after it."""
        size = self.model.vocab_size

        def logprob(other_id: int) -> float:
            return -0.1 - 3.0 * min((other_id - token_id) % size, 30)

        top_ids = [(token_id + i) % size for i in range(count)]
        given = [logprob(i) for i in given_ids]
        return TokenLogprobs(token_id, -0.1, 1, top_ids, [logprob(i) for i in top_ids], given)


def _control_ids(folder: Path) -> frozenset[int]:
    """Ids of the tokenizer's added tokens; none where the folder has no tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return frozenset()
    return frozenset(token.id for token in read_added_tokens(folder))
