"""Equal and nearly equal rows are found, and only those; the first stays; leaks from valid into train are found."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.__main__ import main
from trainer.data.dedup import without_duplicates
from trainer.data.duplicates import Fingerprints, find_duplicates
from trainer.data.fingerprint import RECALL, Bands, band_hashes, grams, similarity
from trainer.data.rows import LedgerLine, Row

LETTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]


def chat(question: str, answer: str, line: int = 1) -> Row:
    return Row("x.jsonl", line, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def texts(count: int, length: int = 200, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length)) for _ in range(count)]


def changed(text: str, places: int, seed: int = 0) -> str:
    """The text with so many characters replaced by ones that no other text has."""
    draw = random.Random(seed)
    letters = list(text)
    for number, place in enumerate(draw.sample(range(len(text)), places)):
        letters[place] = chr(0x8000 + draw.randrange(2000) + number)
    return "".join(letters)


def pairs(given: list[str], threshold: float | None = 0.8, **options: object) -> dict[int, int]:
    fingerprints = Fingerprints(threshold)
    for text in given:
        fingerprints.add(text)
    return {d.number: d.of for d in find_duplicates(fingerprints, given.__getitem__, **options)}  # type: ignore[arg-type]


@given(st.lists(st.text(max_size=30), max_size=12))
def test_exact_duplicates_are_what_python_finds(given: list[str]) -> None:
    first: dict[str, int] = {}
    expected = {n: first[text] for n, text in enumerate(given) if first.setdefault(text, n) != n}
    assert pairs(given, threshold=None) == expected


@given(st.lists(st.text(alphabet="ab你好 ", max_size=12), min_size=2, max_size=8))
def test_no_pair_below_the_threshold_is_called_near(given: list[str]) -> None:
    for number, other in pairs(given, threshold=0.6).items():
        assert given[number] == given[other] or similarity(grams(given[number]), grams(given[other])) >= 0.6


def test_near_duplicates_are_found_with_the_promised_recall() -> None:
    """Pairs just over the threshold, the hardest: 400 of them, each among 800 texts."""
    given = texts(400)
    near = [changed(text, 7, seed) for seed, text in enumerate(given)]
    measured = [similarity(grams(one), grams(other)) for one, other in zip(given, near, strict=True)]
    hard = {n + 400 for n, value in enumerate(measured) if value >= 0.8}
    found = pairs([*given, *near])
    assert len(hard) > 350 and max(measured) < 0.9
    assert all(found[n] == n - 400 for n in found) and set(found) <= hard
    assert len(found) >= (RECALL - 0.01) * len(hard)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I reset the password of my account?", "How do I reset the password of my accounts?"),
        ("请问高血压病人平时应该注意哪些饮食方面的问题", "请问高血压病人平时应该注意哪些饮食方面的问题呢"),
    ],
)
def test_short_texts_of_both_scripts(one: str, other: str) -> None:
    assert pairs([one, other]) == {1: 0}


def test_signatures_estimate_similarity_without_bias() -> None:
    """With bands of one number, the share of equal bands estimates the Jaccard similarity (Broder 1997)."""
    given = texts(300)
    near = [changed(text, 1 + n % 40, n) for n, text in enumerate(given)]
    bands = Bands(128, 1)
    estimates = (band_hashes(given, bands) == band_hashes(near, bands)).mean(axis=1)
    measured = np.array([similarity(grams(one), grams(other)) for one, other in zip(given, near, strict=True)])
    assert abs((estimates - measured).mean()) < 0.01 and (estimates - measured).std() < 0.06


def test_a_text_has_the_same_bands_in_any_batch() -> None:
    given = ["", "a", "你", *texts(5, 50), "", "x" * 300]
    bands = Bands.for_threshold(0.8)
    whole = band_hashes(given, bands)
    for number, text in enumerate(given):
        if text:
            assert np.array_equal(band_hashes([text], bands)[0], whole[number])
    assert len(set(whole[:, 0].tolist())) == len(given)  # empty texts are like nothing, not even each other


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_keep_the_promised_recall(threshold: float) -> None:
    bands = Bands.for_threshold(threshold)
    assert bands.num_bands * bands.width <= 128
    assert 1 - (1 - threshold**bands.width) ** bands.num_bands >= RECALL


def test_the_kept_row_is_the_first_and_the_ledger_names_it() -> None:
    a, b = texts(2)
    rows = [
        chat("问", a, 1),
        chat("问", b, 2),
        chat("问", changed(a, 2), 3),
        chat(" 问", b + "\n", 4),
        chat("问", a, 5),
    ]
    done = list(without_duplicates(rows, 0.8))
    assert [row.line for row in done if isinstance(row, Row)] == [1, 2]
    lines = [line for line in done if isinstance(line, LedgerLine)]
    assert [(line.line, line.code) for line in lines] == [(3, "near-duplicate"), (4, "duplicate"), (5, "duplicate")]
    assert [line.detail.rpartition(":")[2] for line in lines] == ["1", "2", "1"]


def test_rows_come_back_as_they_were() -> None:
    full = Row(
        "a/b.jsonl",
        9,
        ({"role": "user", "content": "问\u2028"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}),
        chosen="甲",
        rejected="乙",
        tools="[]",
        extra={"label": "内科"},
    )
    assert list(without_duplicates([full], 0.8)) == [full]


def test_what_is_compared_can_be_chosen() -> None:
    question, answer, other = texts(3, 60)
    rows = [chat(question, answer), chat(question, other), chat(other, answer)]
    kept = {
        by: sum(isinstance(r, Row) for r in without_duplicates(rows, 0.8, by)) for by in ("row", "question", "answer")
    }  # type: ignore[arg-type]
    assert kept == {"row": 3, "question": 2, "answer": 2}


def test_system_prompts_do_not_make_rows_alike() -> None:
    system = {"role": "system", "content": texts(1, 400, seed=5)[0]}
    one, other = (Row("x", n, (system, *chat("问", text).messages)) for n, text in enumerate(texts(2, 40)))
    assert list(without_duplicates([one, other], 0.8)) == [one, other]


def test_rows_that_share_a_long_form_are_no_duplicates_and_cost_a_bounded_time() -> None:
    """600 rows with 70% in common: every band meets, no pair is near."""
    form = texts(1, 140, seed=3)[0]
    rows = [form + own for own in texts(600, 60, seed=4)]
    measured = 0

    def read_text(number: int) -> str:
        nonlocal measured
        measured += 1
        return rows[number]

    fingerprints = Fingerprints(0.8)
    for row in rows:
        fingerprints.add(row)
    assert list(find_duplicates(fingerprints, read_text)) == []
    assert measured <= 2 * len(rows)  # each text is read once and its grams are kept


def jsonl(path: Path, rows: list[Row]) -> Path:
    lines = [json.dumps({"messages": list(row.messages)}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(path: Path) -> Iterator[dict[str, object]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def test_the_dedup_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = texts(2)
    raw = jsonl(tmp_path / "raw.jsonl", [chat("一", a), chat("二", b), chat("一", a), chat("一", changed(a, 3))])
    output = tmp_path / "unique.jsonl"
    assert main(["data", "dedup", str(raw), "--output", str(output)]) == 0
    assert len(list(read(output))) == 2
    ledger = list(read(tmp_path / "unique.rejects.jsonl"))
    assert [(line["line"], line["code"]) for line in ledger] == [(3, "duplicate"), (4, "near-duplicate")]
    assert all(str(line["detail"]).endswith(f"{raw}:1") for line in ledger)
    assert main(["data", "dedup", str(raw), "--exact", "--output", str(output)]) == 0
    assert len(list(read(output))) == 3
    assert "dropped: duplicate 1" in capsys.readouterr().err


def test_the_leak_command_names_valid_rows_and_can_take_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c, d = texts(4, 60)
    train = jsonl(tmp_path / "train.jsonl", [chat(a, "甲甲"), chat(b, "乙乙"), chat(b, "丙丙")])
    rows = [chat(c, "甲甲"), chat(b, "丁丁"), chat(changed(a, 1), "甲甲"), chat(c, "甲甲"), chat(d, "戊")]
    valid = jsonl(tmp_path / "valid.jsonl", rows)
    command = ["data", "leak", str(train), "--valid", str(valid)]
    assert main(command) == 3
    told = capsys.readouterr()
    exact, near = told.out.splitlines()
    assert exact == f"{valid}:2 leak: the same as {train}:2"
    assert near.startswith(f"{valid}:3 near-leak: ") and near.endswith(f"{train}:1")
    assert "2 of 5 valid rows are among 3 train rows" in told.err
    output = tmp_path / "clean.jsonl"
    assert main([*command, "--output", str(output)]) == 0
    assert len(list(read(output))) == 3  # twice the same row in valid is not a leak
    capsys.readouterr()
    assert main(["data", "leak", str(train), "--valid", str(output)]) == 0
    assert "0 of 3" in capsys.readouterr().err


def test_a_threshold_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "dedup", "x.jsonl", "--threshold", "80", "--output", str(tmp_path / "y.jsonl")])
    assert stopped.value.code == 2 and "for example 0.8" in capsys.readouterr().err
