"""Prompts and what might follow them as token ids, the same for every candidate whose tokenizer is at hand."""

from collections.abc import Sequence

from server.text.render import ChatRenderer
from server.text.tokenizer import Tokenizer
from trainer.evaluate.candidate import ItemFailed, Prompt

_TAIL_CHARS = 80  # a last line longer than this is encoded with all that stands before it


class PromptIds:
    """The tokenizer and template of one model folder. All methods raise TextError or TemplateError."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def prompt(self, prompt: Prompt) -> list[int]:
        if prompt.is_plain:
            return self._plain(prompt.text)
        return self._renderer.render(prompt.messages)

    def pair(self, prompt: Prompt, prompt_ids: list[int], continuation: str) -> tuple[list[int], int]:
        """The ids of both, and where the continuation's begin.

        As in lm-evaluation-harness prompt and continuation are encoded as one text; unlike there, a token that holds
        the end of the one and the beginning of the other is the continuation's. After a chat template's last control
        token nothing can fuse. Raises ItemFailed, too: for a continuation that has no ids.
        """
        ids = self._joined(prompt, prompt_ids, continuation)
        return ids, continuation_start(prompt_ids, ids)

    def scored(self, prompt: Prompt, reference: str) -> tuple[list[int], int, int]:
        """The ids of the prompt and the reference as its answer, and where what counts begins and ends."""
        if prompt.is_plain:
            ids = self._plain(prompt.text + reference)
            return ids, parting(self._plain(prompt.text), ids), len(ids)
        answered = [*prompt.messages, {"role": "assistant", "content": reference}]
        text = self._renderer.render_training(answered)
        start = len(self._renderer.render(prompt.messages))
        return text.token_ids, start, start + sum(text.trained[start:])

    def plain(self, text: str) -> list[int]:
        """Of a piece of text, with nothing put before it."""
        return self._tokenizer.encode_plain(text)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._renderer.tokenizer

    def _joined(self, prompt: Prompt, prompt_ids: list[int], continuation: str) -> list[int]:
        if not prompt.is_plain:
            return [*prompt_ids, *self._tokenizer.encode_plain(continuation)]
        tail = last_line(prompt.text)
        if (tail, continuation) not in self._pairs:
            whole = self._tokenizer.encode_plain(tail + continuation)
            self._pairs[tail, continuation] = self._tokenizer.encode_plain(tail), whole
        alone, whole = self._pairs[tail, continuation]
        before = len(prompt_ids) - len(alone)
        if prompt_ids[before:] != alone:
            return self._plain(prompt.text + continuation)
        return [*prompt_ids[:before], *whole]

    def _plain(self, text: str) -> list[int]:
        """Nothing in a benchmark's text is a control token; what the tokenizer itself puts before a text is kept."""
        return [*self._tokenizer.encode_raw(""), *self._tokenizer.encode_plain(text)]


def parting(prompt_ids: list[int], ids: list[int]) -> int:
    """The first place of `ids` that the prompt alone does not have; at least 1, as nothing stands before the first.

    A token in which the prompt's end and what follows are fused is not the prompt's.
    """
    if ids[: len(prompt_ids)] == prompt_ids:
        return max(len(prompt_ids), 1)
    pairs = zip(prompt_ids, ids, strict=False)
    return max(next((place for place, (own, other) in enumerate(pairs) if own != other), len(ids)), 1)


def shared_start(pairs: Sequence[tuple[list[int], int]]) -> int:
    """From where continuations of one prompt are summed: sums are compared only over the same text, so where one of
    them is fused with the prompt's end, that end counts for all."""
    return min(start for _, start in pairs)


def continuation_start(prompt_ids: list[int], ids: list[int]) -> int:
    """`parting`. Raises ItemFailed where nothing follows it: a sum over nothing is 0, the greatest log-probability."""
    start = parting(prompt_ids, ids)
    if start >= len(ids):
        raise ItemFailed("no-tokens: the continuation has none of its own")
    return start


def last_line(text: str) -> str:
    """Enough of the end of a text to know how it is cut into tokens there: no token goes over a line's begin."""
    line = text[text.rfind("\n") + 1 :]
    return line if line and not line[0].isspace() and len(line) <= _TAIL_CHARS else text
