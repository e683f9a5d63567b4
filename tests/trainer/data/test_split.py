"""Nothing of valid can be learnt by heart from train; every label has its share; the same seed draws the same rows."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ConfigError
from trainer.__main__ import main
from trainer.data.fingerprint import grams, similarity
from trainer.data.rows import Row
from trainer.data.sample import balanced_counts, sample_balanced, sample_rows
from trainer.data.split import Split, split
from trainer.data.spool import Spool

LETTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def text(seed: int, length: int = 60) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


def chat(question: str, answer: str, label: str = "") -> Row:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row("x.jsonl", 1, turns, extra={"label": label} if label else {})


def drawn(rows: list[Row], size: float, **options: object) -> Split:
    with Spool() as spool:
        return split(iter(rows), spool, size, **options)  # type: ignore[arg-type]


def data(families: int = 120) -> tuple[list[Row], list[int]]:
    """Rows in families that must not be divided: one question with several answers, or near duplicates."""
    draw = random.Random(0)
    rows, family = [], []
    for number in range(families):
        question, answer = text(number), text(10_000 + number)
        label = draw.choices(["often", "some", "rare"], [80, 15, 5])[0]
        members = [chat(question, answer, label)]
        for copy in range(number % 4):
            if copy % 2:
                members.append(chat(question[:-1] + "吗", answer, label))  # nearly the same row
            else:
                members.append(chat(question, text(20_000 + 10 * number + copy), label))  # another answer
        rows += members
        family += [number] * len(members)
    order = list(range(len(rows)))
    draw.shuffle(order)
    return [rows[n] for n in order], [family[n] for n in order]


def test_no_family_is_divided_and_the_size_is_met() -> None:
    rows, family = data()
    result = drawn(rows, 0.2)
    sides = {number: {n in result.valid for n, f in enumerate(family) if f == number} for number in set(family)}
    assert all(len(side) == 1 for side in sides.values())
    assert abs(len(result.valid) - 0.2 * len(rows)) <= 4
    assert result.num_groups == 120 and result.largest_group == 4


def test_near_duplicates_stay_together_through_a_chain() -> None:
    """a is like b and b like c, but a is not like c."""
    a = text(1, 100)
    b = a[:95] + text(2, 5)
    c = text(3, 5) + b[5:]
    near = [similarity(grams(one), grams(other)) for one, other in ((a, b), (b, c), (a, c))]
    assert near[0] > 0.8 and near[1] > 0.8 and near[2] < 0.8
    for seed in range(10):
        others = [chat(text(100 + n), "答") for n in range(20)]
        result = drawn([chat(a, "答"), chat(b, "答"), chat(c, "答"), *others], 0.3, seed=seed)
        assert len({n in result.valid for n in range(3)}) == 1


def test_every_label_has_its_share() -> None:
    rows = [chat(text(n), text(5000 + n), "abc"[(n > 200) + (n > 280)]) for n in range(300)]
    result = drawn(rows, 0.1, label_field="label")
    counts = {label: (train, valid) for label, train, valid in result.labels}
    assert counts == {"a": (181, 20), "b": (72, 8), "c": (17, 2)}
    assert len(result.valid) == 30


def test_a_size_of_one_or_more_is_a_number_of_rows() -> None:
    rows = [chat(text(n), "答") for n in range(50)]
    assert len(drawn(rows, 7).valid) == 7
    assert len(drawn(rows, 1).valid) == 1


def test_the_seed_decides() -> None:
    rows = [chat(text(n), "答") for n in range(50)]
    assert drawn(rows, 9, seed=1).valid == drawn(rows, 9, seed=1).valid != drawn(rows, 9, seed=2).valid


@pytest.mark.parametrize("size", [0.001, 50, 900])
def test_an_empty_side_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="both sides need a row"):
        drawn([chat(text(n), "答") for n in range(50)], size)


def test_the_split_command_leaves_no_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, output = tmp_path / "raw.jsonl", tmp_path / "out"
    rows, _ = data()
    write(raw, rows)
    command = ["data", "split", str(raw), "--size", "0.2", "--label-field", "label", "--output", str(output)]
    assert main(command) == 0
    train, valid = output / "train.jsonl", output / "valid.jsonl"
    lines = [*train.read_text("utf-8").splitlines(), *valid.read_text("utf-8").splitlines()]
    assert Counter(lines) == Counter(raw.read_text("utf-8").splitlines())
    assert "often" in capsys.readouterr().out
    for by in ("row", "question"):
        assert main(["data", "leak", str(train), "--valid", str(valid), "--by", by]) == 0


def test_sampling_takes_different_rows() -> None:
    taken = sample_rows(100, 30, seed=1)
    assert len(taken) == 30 == taken.total() and max(taken) < 100
    assert taken == sample_rows(100, 30, seed=1) != sample_rows(100, 30, seed=2)
    with pytest.raises(ConfigError, match="there are 100"):
        sample_rows(100, 101, seed=1)


COUNTS = {"a": 1000, "b": 100, "c": 10}


def test_temperature_moves_from_the_data_s_shares_to_equal_ones() -> None:
    assert balanced_counts(COUNTS, 111, 1, 100) == {"a": 100, "b": 10, "c": 1}
    assert balanced_counts(COUNTS, 300, 1e9, 100) == {"a": 100, "b": 100, "c": 100}
    middle = balanced_counts(COUNTS, 1000, 2, 100)
    assert middle == {"a": 706, "b": 223, "c": 71}  # as 31.6 : 10 : 3.16


def test_no_row_is_repeated_too_often_and_the_others_make_up_for_it() -> None:
    assert balanced_counts(COUNTS, 300, 1e9, 2) == {"a": 140, "b": 140, "c": 20}
    with pytest.raises(ConfigError, match="at most 2 times"):
        balanced_counts(COUNTS, 2221, 1, 2)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1),
    st.floats(0.3, 50),
    st.integers(1, 4),
    st.data(),
)
def test_quotas_add_up_and_rows_of_a_label_are_taken_alike(
    counts: dict[str, int], temperature: float, max_repeat: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, max_repeat * sum(counts.values())))
    labels = [label for label, count in counts.items() for _ in range(count)]
    taken = sample_balanced(labels, wanted, temperature, max_repeat, seed=1)
    assert taken.total() == wanted and max(taken.values()) <= max_repeat
    for label in counts:
        times = [taken[number] for number, other in enumerate(labels) if other == label]
        assert max(times) - min(times) <= 1


def test_the_sample_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, output = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    write(raw, [chat(text(n), "答", "often" if n < 90 else "rare") for n in range(100)])
    command = ["data", "sample", str(raw), "-n", "60", "--output", str(output)]
    assert main([*command, "--balance", "label", "--temperature", "100", "--max-repeat", "3"]) == 0
    labels = Counter(json.loads(line)["label"] for line in output.read_text("utf-8").splitlines())
    assert labels == {"often": 31, "rare": 29} or labels == {"often": 30, "rare": 30}
    assert "rare" in capsys.readouterr().out
    assert main([*command[:-3], "101", "--output", str(output)]) == 2
    assert "there are 100" in capsys.readouterr().err
    assert len(output.read_text("utf-8").splitlines()) == 60  # what was there stays


def write(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps({"messages": list(row.messages), **row.extra}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
