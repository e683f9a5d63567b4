"""One question of a benchmark, as every reader gives it and every task asks it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A question with lettered options. `answers` are indices into `options`, ascending; more than one only where the
    benchmark's question has several right options."""

    item_id: str  # unique in its benchmark and the same on every run: what candidates are paired by
    benchmark: str  # mmcu, ceval, cmmlu, mmlu, gaokao, agieval, cpsyexam, option_text
    subject: str
    question: str
    options: tuple[str, ...]
    answers: tuple[int, ...]
    is_multiple: bool = False  # the question's type: several options may be right
    is_example: bool = False  # of the dev split: shown in few-shot prompts, never scored
    source: str = ""  # file, and sheet
    line: int = 0

    @property
    def letters(self) -> str:
        """The right letters, `"B"` or `"ACD"`."""
        return "".join(LETTERS[index] for index in self.answers)


@dataclass(frozen=True, kw_only=True)
class TextItem:
    """A conversation that ends with the user, and answers that are right. BBH's short answers are compared as they are
    (`is_exact`), others by overlap."""

    item_id: str
    benchmark: str
    subject: str
    messages: tuple[Mapping[str, str], ...]
    references: tuple[str, ...]
    is_exact: bool = False
    is_example: bool = False
    source: str = ""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class SqlItem:
    """A question about a database, and queries of which each is right. `database` is None where only a schema came."""

    item_id: str
    benchmark: str
    subject: str  # the database's name
    question: str
    schema: str  # CREATE TABLE statements, for the prompt
    queries: tuple[str, ...]
    database: Path | None = None
    source: str = ""
    line: int = 0


Item = ChoiceItem | TextItem | SqlItem


@dataclass(frozen=True, kw_only=True)
class RefusedItem:
    """An item that cannot be scored. `code` is short and kebab-case, `detail` says what is wrong, never the text."""

    benchmark: str
    source: str
    line: int
    code: str
    detail: str


@dataclass
class ItemSet:
    """What a reader found in one benchmark: in = scored + examples + refused."""

    benchmark: str
    items: list[Item] = field(default_factory=list)
    refused: list[RefusedItem] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)  # what was mended or noticed in items that are used, by code
