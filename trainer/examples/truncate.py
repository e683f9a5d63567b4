"""Makes a conversation fit its limits without breaking its structure.

Order: answers over `max_target_length` end after their last whole sentence that fits; then the oldest turns go; then
the middle of the one user text that is left. An assistant's header and its stop token are never lost, because every
candidate is rendered whole. What still does not fit is refused. Knows nothing of files or tensors.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.render import ChatRenderer, TrainingText
from trainer.data.rows import Message, RowRefused

MIN_KEPT = 16  # characters of a user's text; less says nothing about the question
GAP = "…"
_SENTENCE_END = re.compile(r"[。！？!?；;\n]|\.(?=\s|$)")


@dataclass(frozen=True)
class Limits:
    """Tokens. `max_source_length` caps what stands before the last answer, `max_target_length` each answer."""

    max_length: int
    max_source_length: int | None = None
    max_target_length: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What is trained, and what was taken away for it, in words that hold none of the text."""

    messages: tuple[Message, ...]
    text: TrainingText
    cuts: tuple[str, ...] = ()


def fit(
    messages: Sequence[Message], renderer: ChatRenderer, limits: Limits, tools: Sequence[Any] | None = None
) -> Fitted:
    """Raises RowRefused("too-long") when nothing but the answer is left to cut, and the renderer's TextError."""
    return _Fitting(renderer, limits, tools).run(tuple(messages))


class _Fitting:
    def __init__(self, renderer: ChatRenderer, limits: Limits, tools: Sequence[Any] | None) -> None:
        self._renderer = renderer
        self._limits = limits
        self._tools = tools

    def run(self, messages: tuple[Message, ...]) -> Fitted:
        text = self._render(messages)
        if self._fits(text):
            return Fitted(messages, text)
        cuts = []
        length = len(text.token_ids)
        shorter = self._with_short_answers(messages)
        if shorter != messages:
            cuts.append(f"answers cut to max_target_length={self._limits.max_target_length}")
        messages, num_gone = self._without_old_turns(shorter)
        if num_gone:
            cuts.append(f"{num_gone} oldest turns left out")
        if not self._fits(self._render(messages)):
            messages, num_characters = self._with_short_question(messages, length)
            cuts.append(f"{num_characters} characters cut from the middle of the oldest user text")
        return Fitted(messages, self._render(messages), (*cuts, f"it was {length} tokens long"))

    def _render(self, messages: Sequence[Message]) -> TrainingText:
        return self._renderer.render_training(messages, tools=self._tools)

    def _fits(self, text: TrainingText) -> bool:
        runs = learned_runs(text.trained)
        source, target = runs[-1][0], max(end - start for start, end in runs)
        most = self._limits.max_source_length, self._limits.max_target_length
        return (
            len(text.token_ids) <= self._limits.max_length
            and (most[0] is None or source <= most[0])
            and (most[1] is None or target <= most[1])
        )

    def _with_short_answers(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        most = self._limits.max_target_length
        if most is None:
            return messages
        runs = iter(learned_runs(self._render(messages).trained))
        kept = []
        for message in messages:
            if message["role"] == "assistant":
                start, end = next(runs)
                if end - start > most:
                    message = self._short_answer(message, end - start, most)
            kept.append(message)
        return tuple(kept)

    def _short_answer(self, message: Message, length: int, most: int) -> Message:
        """Ends after a whole sentence: an answer cut anywhere else would teach to stop in mid-sentence."""
        content = message["content"]
        ends = [match.end() for match in _SENTENCE_END.finditer(content)]
        room = most - (length - len(self._renderer.tokenizer.encode_plain(content)))  # its stop token, and tool calls
        count = _greatest(
            lambda n: len(self._renderer.tokenizer.encode_plain(content[: ends[n - 1]].rstrip())) <= room, len(ends)
        )
        if not count:
            raise RowRefused("too-long", f"no whole sentence of an answer fits max_target_length={most}")
        return {**message, "content": content[: ends[count - 1]].rstrip()}

    def _without_old_turns(self, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], int]:
        """The latest exchanges that fit, at least one, and how many messages went."""
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not starts:
            return messages, 0
        head = messages[: starts[0]]
        candidates = [head + messages[start:] for start in starts]  # ever fewer
        num_kept = _greatest(lambda n: self._fits(self._render(candidates[-n])), len(candidates)) or 1
        return candidates[-num_kept], starts[-num_kept] - starts[0]

    def _with_short_question(self, messages: tuple[Message, ...], length: int) -> tuple[tuple[Message, ...], int]:
        refused = RowRefused("too-long", f"{length} tokens do not fit {self._limit_names()}; the answer is kept whole")
        at = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
        if at is None:
            raise refused
        content = messages[at]["content"]

        def cut(num_kept: int) -> tuple[Message, ...]:
            return (
                *messages[:at],
                {**messages[at], "content": _without_middle(content, num_kept)},
                *messages[at + 1 :],
            )

        def fits(num_kept: int) -> bool:
            return num_kept <= MIN_KEPT or self._fits(self._render(cut(num_kept)))

        num_kept = _greatest(fits, len(content) - 1)
        if num_kept < MIN_KEPT or not self._fits(self._render(cut(num_kept))):
            raise refused
        return cut(num_kept), len(content) - num_kept

    def _limit_names(self) -> str:
        named = ("max_length", "max_source_length", "max_target_length")
        return ", ".join(f"{name}={getattr(self._limits, name)}" for name in named if getattr(self._limits, name))


def learned_runs(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of every assistant's turn among the tokens."""
    edges = [0, *(index for index in range(1, len(trained)) if trained[index] != trained[index - 1]), len(trained)]
    return [(start, end) for start, end in itertools.pairwise(edges) if start < end and trained[start]]


def _without_middle(text: str, num_kept: int) -> str:
    """The first and the last half of what is kept, and a sign that something is missing between them."""
    tail = num_kept // 2
    return text[: num_kept - tail].rstrip() + GAP + text[len(text) - tail :].lstrip()


def _greatest(holds: Callable[[int], bool], most: int) -> int:
    """The greatest n in 1..most for which a falling property holds; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
