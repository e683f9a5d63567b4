"""Sets of items as text: a table of counts, and some of the items. Knows neither files nor models."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unicodedata import east_asian_width

from trainer.evaluate.items import LETTERS, ChoiceItem, Item, ItemSet, SqlItem, TextItem

_HEAD = ("benchmark", "in", "scored", "examples", "refused", "refused by reason", "noted in used items")
_SHOWN = 400  # characters of a text


@dataclass
class _Counts:
    scored: int = 0
    examples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    notes: dict[str, int] = field(default_factory=dict)

    def cells(self, name: str) -> tuple[str, ...]:
        refused = self.refused.total()
        total = self.scored + self.examples + refused
        numbers = (total, self.scored, self.examples, refused)
        return (name, *map(str, numbers), _listed(self.refused), _listed(self.notes))


def table(sets: Sequence[ItemSet], *, by_file: bool = False) -> str:
    """In = scored + examples + refused, one line per benchmark or per file; with a total where there are several."""
    counts = _by_file(sets) if by_file else [(each.benchmark, _counted(each)) for each in sets]
    rows = [_HEAD, *(count.cells(name) for name, count in counts)]
    if len(counts) > 1:
        total = _Counts()
        for _, count in counts:
            total.scored += count.scored
            total.examples += count.examples
            total.refused += count.refused
        rows.append(total.cells("total"))
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(_padded, row, widths, range(len(row)))).rstrip() for row in rows)


def shown(item_set: ItemSet, count: int) -> Iterator[str]:
    """The first items and refusals of a set; a reader compares them with the file."""
    for item in item_set.items[:count]:
        mark = " (example)" if not isinstance(item, SqlItem) and item.is_example else ""
        yield f"{item_set.benchmark} {item.item_id}{mark}  {item.subject}  {item.source}:{item.line}"
        yield from (f"  {line}" for line in _lines(item))
    for refused in item_set.refused[:count]:
        yield f"{item_set.benchmark} refused  {refused.source}:{refused.line}  {refused.code}: {refused.detail}"


def _lines(item: Item) -> Iterator[str]:
    if isinstance(item, ChoiceItem):
        yield _short(item.question)
        for index, option in enumerate(item.options):
            yield f"{'*' if index in item.answers else ' '} {LETTERS[index]}. {_short(option)}"
    elif isinstance(item, TextItem):
        yield from (f"{message['role']}: {_short(message['content'])}" for message in item.messages)
        yield from (f"* {_short(reference)}" for reference in item.references)
    else:
        yield _short(item.question)
        yield f"  database: {item.database or 'none, schema only'}"
        yield from (f"* {_short(query)}" for query in item.queries)


def _counted(item_set: ItemSet) -> _Counts:
    counts = _Counts(refused=Counter(refused.code for refused in item_set.refused), notes=item_set.notes)
    for item in item_set.items:
        _count(counts, item)
    return counts


def _by_file(sets: Sequence[ItemSet]) -> list[tuple[str, _Counts]]:
    files: dict[str, _Counts] = {}
    for item_set in sets:
        for item in item_set.items:
            _count(files.setdefault(item.source, _Counts()), item)
        for refused in item_set.refused:
            files.setdefault(refused.source, _Counts()).refused[refused.code] += 1
    return sorted(files.items())


def _count(counts: _Counts, item: Item) -> None:
    if not isinstance(item, SqlItem) and item.is_example:
        counts.examples += 1
    else:
        counts.scored += 1


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in sorted(counts.items(), key=lambda pair: -pair[1])) or "-"


def _padded(text: str, width: int, column: int) -> str:
    space = " " * (width - _width(text))
    return space + text if 0 < column < 5 else text + space


def _width(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _short(text: str) -> str:
    plain = text.replace("\n", "⏎")
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}… ({len(plain)} characters)"
