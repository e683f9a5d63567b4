import json
from pathlib import Path

import pytest

from trainer.data.repeats import SeenRows
from trainer.data.rows import LedgerLine, Note, Row
from trainer.errors import DataError
from trainer.ledger import Ledger

BAD = LedgerLine("x.jsonl", 3, "dropped", "bad-json", "character 7")
MENDED = Row("x.jsonl", 1, text="a", notes=(Note("duplicate", "", "kept"), Note("turns-joined", "two"), Note("x")))


def test_one_line_per_row_named_after_the_gravest_note(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "rejects.jsonl"
    with Ledger(path) as ledger:
        assert list(ledger.take([MENDED, Row("x.jsonl", 2, text="b"), BAD])) == [MENDED, Row("x.jsonl", 2, text="b")]
        lines = [json.loads(line) for line in path.read_text().splitlines()]  # there before the ledger is closed
    assert lines == [
        {
            "source": "x.jsonl",
            "line": 1,
            "action": "repaired",
            "code": "turns-joined",
            "detail": "two",
            "also": ["duplicate", "x"],
        },
        {"source": "x.jsonl", "line": 3, "action": "dropped", "code": "bad-json", "detail": "character 7"},
    ]
    assert ledger.summary() == (
        "rows: 3 read, 2 used, 1 dropped, 1 repaired, 0 shortened\n"
        "  dropped: bad-json 1\n  repaired: turns-joined 1, x 1\n  kept: duplicate 1"
    )


def test_what_a_later_step_does_to_a_row_is_not_a_new_row() -> None:
    ledger = Ledger()
    rows = list(ledger.take(Row("x", line, text="a") for line in range(1, 5)))
    ledger.add(LedgerLine("x", rows[0].line, "dropped", "too-long", ""))
    ledger.add(LedgerLine("x", rows[1].line, "shortened", "too-long", ""))
    assert (ledger.num_rows, ledger.num_used, ledger.ratio, ledger.rows["shortened"]) == (4, 3, 0.25, 1)
    ledger.check_ratio(0.25)
    with pytest.raises(DataError, match=r"1 of 4 rows \(25.0%\).*first: x:1 too-long"):
        ledger.check_ratio(0.2)


@pytest.mark.parametrize("items", [[], [BAD]])
def test_nothing_usable_is_an_error(items: list[LedgerLine]) -> None:
    ledger = Ledger()
    assert list(ledger.take(items)) == []
    with pytest.raises(DataError, match=f"none of the {len(items)} rows can be used"):
        ledger.check_ratio(1.0)


def test_seen_rows_tells_repeats_through_every_growth() -> None:
    seen = SeenRows()
    rows = [Row("x", line, text=str(line % 9000)) for line in range(18000)]
    assert [seen.add(row) for row in rows] == [False] * 9000 + [True] * 9000


def test_where_a_text_stands_in_a_row_tells_rows_apart() -> None:
    seen = SeenRows()
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rows = [
        Row("x", 1, turns),
        Row("x", 1, turns[:1], chosen="b"),
        Row("x", 1, turns[:1], rejected="b"),
        Row("x", 1, turns[::-1]),
    ]
    assert [seen.add(row) for row in rows] == [False] * 4 and seen.add(Row("y", 9, turns))
