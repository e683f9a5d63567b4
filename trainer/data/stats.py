"""What is in a data set: counts, lengths, turns, labels. Counts as rows go by; knows no files and draws nothing."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.errors import ConfigError
from trainer.data.rows import Row
from trainer.data.texts import answer_of, question_of, text_of

NO_LABEL = "(none)"
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
TAIL_SHARE = 0.2  # the long tail: the rarest labels that together hold at most this share of the rows


@dataclass
class Lengths:
    """A distribution kept as counts: exact, and as large as there are different lengths."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, length: int) -> None:
        self.counts[length] += 1

    def percentile(self, percent: float) -> int:
        """The smallest length that at least `percent` % of the rows do not exceed."""
        wanted = percent / 100 * self.counts.total()
        seen = 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= wanted:
                return length
        return 0

    def summary(self) -> dict[str, float]:
        """Least, mean, percentiles and most."""
        total = self.counts.total()
        mean = sum(length * count for length, count in self.counts.items()) / max(1, total)
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        least, most = (min(self.counts), max(self.counts)) if total else (0, 0)
        return {"least": least, "mean": round(mean, 1), **percentiles, "most": most}


@dataclass(frozen=True)
class LabelShare:
    label: str
    count: int
    share: float
    cumulative: float
    is_tail: bool


class Statistics:
    """Collects from rows; `count_tokens` gives a row's length in tokens, if a tokenizer is at hand."""

    def __init__(self, label_field: str | None = None, count_tokens: Callable[[Row], int] | None = None) -> None:
        self.num_rows = 0
        self.label_field = label_field
        self.labels: Counter[str] = Counter()
        self.fields: set[str] = set()  # that the rows have beside their text
        self.sources: Counter[str] = Counter()
        self.turns = Lengths()
        self.lengths = {name: Lengths() for name in ("question", "answer", "row")}
        self._count_tokens = count_tokens
        if count_tokens:
            self.lengths["tokens"] = Lengths()

    def add(self, row: Row) -> None:
        self.num_rows += 1
        self.sources[row.source] += 1
        self.turns.add(sum(message["role"] == "user" for message in row.messages))
        for name, text in (("question", question_of(row)), ("answer", answer_of(row)), ("row", text_of(row))):
            self.lengths[name].add(len(text))
        if self._count_tokens:
            self.lengths["tokens"].add(self._count_tokens(row))
        self.fields.update(row.extra)
        if self.label_field:
            self.labels[label_of(row, self.label_field)] += 1

    def label_shares(self) -> list[LabelShare]:
        """Labels by count, the most frequent first."""
        seen = 0
        result = []
        for label, count in sorted(self.labels.items(), key=lambda item: (-item[1], item[0])):
            is_tail = self.num_rows - seen <= TAIL_SHARE * self.num_rows
            seen += count
            result.append(LabelShare(label, count, count / self.num_rows, seen / self.num_rows, is_tail))
        return result

    def as_json(self) -> Mapping[str, Any]:
        """Everything, for `stats.json`."""
        labels = {
            "field": self.label_field,
            "different": len(self.labels),
            "tail": sum(share.is_tail for share in self.label_shares()),
            "counts": {share.label: share.count for share in self.label_shares()},
        }
        return {
            "rows": self.num_rows,
            "files": dict(self.sources),
            "turns": self.turns.summary(),
            **{_titles(name): lengths.summary() for name, lengths in self.lengths.items()},
            **({"labels": labels} if self.label_field else {}),
        }


def label_of(row: Row, name: str) -> str:
    """A row's label by the name of its field."""
    return row.extra.get(name, "").strip() or NO_LABEL


def check_labels(labels: Iterable[str], name: str) -> None:
    """Raises ConfigError when no row has a label: a misspelt field."""
    if set(labels) <= {NO_LABEL}:
        raise ConfigError(f"no row has the field {name!r}; `python -m trainer data stats FILE` lists the fields")


def table(statistics: Statistics, num_labels: int = 20) -> str:
    """For the screen: lengths by percentile, and the head and the tail of the labels."""
    columns = ("least", *(f"p{percent}" for percent in PERCENTILES), "most", "mean")
    lines = [f"{statistics.num_rows} rows", f"{'':<22}" + "".join(f"{column:>8}" for column in columns)]
    for name, lengths in (("turns", statistics.turns), *statistics.lengths.items()):
        summary = lengths.summary()
        title = name if name == "turns" else _titles(name)
        lines.append(f"{title:<22}" + "".join(f"{summary[column]:>8g}" for column in columns))
    if statistics.fields:
        lines.append(f"fields: {', '.join(sorted(statistics.fields))}")
    if statistics.label_field:
        lines += ["", *_label_lines(statistics, num_labels)]
    return "\n".join(lines)


def _label_lines(statistics: Statistics, num_labels: int) -> list[str]:
    shares = statistics.label_shares()
    tail = sum(share.is_tail for share in shares)
    yielded = [
        f"{statistics.label_field}: {len(shares)} labels; the {tail} rarest hold at most {TAIL_SHARE:.0%} of the rows"
    ]
    for place, share in enumerate(shares):
        if place == num_labels:
            yielded.append(f"  ... {len(shares) - num_labels} more in the output file")
            break
        mark = "  tail" if share.is_tail else ""
        yielded.append(f"  {share.count:>9} {share.share:>7.2%} {share.cumulative:>8.2%}  {share.label}{mark}")
    return yielded


def _titles(name: str) -> str:
    return "tokens" if name == "tokens" else f"{name}_characters"
