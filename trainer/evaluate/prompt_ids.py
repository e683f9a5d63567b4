"""Prompts and what might follow them as token ids, the same for every candidate whose tokenizer is at hand."""

from server.text.render import ChatRenderer
from server.text.tokenizer import Tokenizer
from trainer.evaluate.candidate import Prompt

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

        As in lm-evaluation-harness: prompt and continuation are encoded as one text, and the continuation begins where
        the ids of the prompt alone end. After a chat template's last control token nothing can fuse.
        """
        if not prompt.is_plain:
            return [*prompt_ids, *self._tokenizer.encode_plain(continuation)], len(prompt_ids)
        tail = last_line(prompt.text)
        if (tail, continuation) not in self._pairs:
            whole = self._tokenizer.encode_plain(tail + continuation)
            self._pairs[tail, continuation] = self._tokenizer.encode_plain(tail), whole
        alone, whole = self._pairs[tail, continuation]
        start = len(prompt_ids)
        if prompt_ids[start - len(alone) :] != alone:
            return self._plain(prompt.text + continuation), start
        return [*prompt_ids[: start - len(alone)], *whole], start

    def scored(self, prompt: Prompt, reference: str) -> tuple[list[int], int, int]:
        """The ids of the prompt and the reference as its answer, and where what counts begins and ends."""
        if prompt.is_plain:
            start = len(self._plain(prompt.text)) if prompt.text else 1
            ids = self._plain(prompt.text + reference)
            return ids, start, len(ids)
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

    def _plain(self, text: str) -> list[int]:
        """Nothing in a benchmark's text is a control token; what the tokenizer itself puts before a text is kept."""
        return [*self._tokenizer.encode_raw(""), *self._tokenizer.encode_plain(text)]


def last_line(text: str) -> str:
    """Enough of the end of a text to know how it is cut into tokens there: no token goes over a line's begin."""
    line = text[text.rfind("\n") + 1 :]
    return line if line and not line[0].isspace() and len(line) <= _TAIL_CHARS else text
