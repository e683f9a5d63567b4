"""One beam search on the KV store: which row holds which beam. What a beam is worth is `beam.py`'s business."""

import numpy as np
from torch import Tensor

from server.engine.backends.hf.beam import BeamSearch, UnusableLogits
from server.engine.backends.hf.rows import common_prefix
from server.engine.backends.hf.scheduler import Scheduler
from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import FinishReason, SequenceOutput


class BeamRows:
    def __init__(self, first: Sequence) -> None:
        self._first = first
        self._search = BeamSearch(first.prompt, first.params, first.stop_ids, first.request.n)
        self.sequences = [first]  # of the running beams, in the search's order

    @property
    def all(self) -> list[Sequence]:
        """Every sequence that has a row, whether it carries a beam now or not."""
        return [self._first, *self._first.other_beams]

    def advance(self, logits: Tensor, scheduler: Scheduler) -> list[SequenceOutput]:
        """Choose one token for every beam (`logits` is `[beams, V]`); the best texts once the search is over."""
        try:
            parents = self._search.advance(logits)
        except UnusableLogits as error:
            return [self._output(index, [], FinishReason.ERROR, error=str(error)) for index in range(self._num_results)]
        if self._search.is_done:
            found = self._search.results()
            # Bans may leave fewer texts than were asked for; a choice without one must end all the same.
            empty = [self._output(index, [], FinishReason.LENGTH) for index in range(len(found), self._num_results)]
            return [
                self._output(index, one.tokens, one.finish_reason, one.stop_token_id) for index, one in enumerate(found)
            ] + empty
        self._move(parents, scheduler)
        return []

    def _move(self, parents: list[int], scheduler: Scheduler) -> None:
        """A beam's first child goes on in its row; further ones take over the rows of beams that ended."""
        before = self.sequences
        spare = [s for s in self.all if s not in [before[parent] for parent in parents]]
        heirs: list[Sequence] = []
        for parent in parents:
            source = before[parent]
            if source not in heirs:
                heirs.append(source)
                continue
            heir = spare.pop()
            if heir.output:
                same = common_prefix(np.array(heir.output, np.int64), np.array(source.output, np.int64))
                shared = heir.num_virtual + len(heir.prompt) + same
            else:
                shared = 0
                scheduler.start(heir)
            scheduler.rows.share(source, heir, min(shared, source.num_cached))
            heir.num_cached = source.num_cached
            heirs.append(heir)
        for heir, beam in zip(heirs, self._search.beams, strict=True):
            heir.output = list(beam.tokens)
            heir.tokens = [*heir.prompt, *beam.tokens]
        self.sequences = heirs

    @property
    def _num_results(self) -> int:
        return self._first.request.n

    def _output(
        self, index: int, tokens: list[int], reason: FinishReason, stop_id: int | None = None, error: str | None = None
    ) -> SequenceOutput:
        output = SequenceOutput(self._first.request.request_id, index, tokens, len(tokens), reason, stop_id)
        output.error, output.num_cached_tokens = error, self._first.num_reused
        return output
