"""Training sequences, kept small: five bytes a token, so that a hundred million tokens fit into half a gigabyte.

Knows no tokenizer and no tensors.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index


@dataclass(frozen=True)
class Example:
    """One training sequence; both lists have the same length. A label is its token where it is learned, else -100."""

    token_ids: list[int]
    labels: list[int]
    source: str = ""
    line: int = 0

    @property
    def origin(self) -> str:
        """Where the row stands, for messages: `file:line`."""
        return f"{self.source}:{self.line}"


class ExampleSet:
    """Examples in order of arrival. Append-only; reading makes the lists anew."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        self._tokens = array("i")
        self._learned = bytearray()
        self._ends = array("q")
        self._lines = array("q")
        self._sources: dict[str, int] = {}
        self._source_of = array("i")
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> int:
        """Returns the example's index."""
        self._tokens.extend(example.token_ids)
        self._learned.extend(label != IGNORED for label in example.labels)
        self._ends.append(len(self._tokens))
        self._lines.append(example.line)
        self._source_of.append(self._sources.setdefault(example.source, len(self._sources)))
        return len(self) - 1

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._span(index)
        token_ids = self._tokens[start:end].tolist()
        learned = self._learned[start:end]
        labels = [token if learn else IGNORED for token, learn in zip(token_ids, learned, strict=True)]
        return Example(token_ids, labels, list(self._sources)[self._source_of[index]], self._lines[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in map(self._span, range(len(self)))]

    def num_trained_tokens(self, indices: Iterable[int]) -> int:
        """Tokens with a label. A sequence's first token is never predicted, whatever its label."""
        return sum(sum(self._learned[start + 1 : end]) for start, end in map(self._span, indices))

    def _span(self, index: int) -> tuple[int, int]:
        return (self._ends[index - 1] if index else 0), self._ends[index]
