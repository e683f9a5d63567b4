"""Counts are exact, the long tail is what its definition says, and a plot never shows boxes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.__main__ import main
from trainer.data.rows import Row
from trainer.data.stats import Lengths, Statistics, table


def chat(question: str, answer: str, label: str = "") -> Row:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row("x.jsonl", 1, turns, extra={"label": label} if label else {})


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(0, 100))
def test_percentiles_are_numpy_s(lengths: list[int], percent: int) -> None:
    counted = Lengths()
    for length in lengths:
        counted.add(length)
    assert counted.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")
    assert counted.summary()["mean"] == round(sum(lengths) / len(lengths), 1)


def test_lengths_turns_and_labels_are_counted() -> None:
    statistics = Statistics("label", count_tokens=lambda row: 7)
    statistics.add(chat("一二三", "四五六七", "内科"))
    statistics.add(Row("y.jsonl", 1, (*chat("一", "二").messages, *chat("三", "四").messages)))
    statistics.add(Row("y.jsonl", 2, text="五六"))
    found = statistics.as_json()
    assert found["rows"] == 3 and found["files"] == {"x.jsonl": 1, "y.jsonl": 2}
    assert (found["turns"]["least"], found["turns"]["most"]) == (0, 2)
    assert statistics.lengths["question"].counts == {3: 2, 2: 1}  # two questions are joined by a line end
    assert statistics.lengths["tokens"].counts == {7: 3}
    assert found["labels"]["counts"] == {"(none)": 2, "内科": 1}
    assert "3 rows" in table(statistics) and "内科" in table(statistics)


def test_the_long_tail_is_the_rarest_labels_with_a_fifth_of_the_rows() -> None:
    statistics = Statistics("label")
    for label, count in {"a": 60, "b": 20, "c": 12, "d": 6, "e": 2}.items():
        for _ in range(count):
            statistics.add(chat("问", "答", label))
    shares = statistics.label_shares()
    assert [(share.label, share.is_tail) for share in shares] == [
        ("a", False),
        ("b", False),
        ("c", True),
        ("d", True),
        ("e", True),
    ]
    assert shares[1].cumulative == 0.8 and shares[-1].cumulative == 1.0


def test_an_empty_set_has_statistics_too() -> None:
    assert Statistics("label").as_json()["rows"] == 0 and table(Statistics("label"))


def write(path: Path, labels: list[str]) -> None:
    rows = [{"instruction": f"问题{n}", "output": "回答" * n, "科室": label} for n, label in enumerate(labels, start=1)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize("command", ["stats --label-field", "split --size 0.5 --label-field", "sample -n 1 --balance"])
def test_a_field_that_no_row_has_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw.json", ["a", "b"])
    action, *options = command.split()
    output = ["--output", str(tmp_path / "out")]
    assert main(["data", action, str(tmp_path / "raw.json"), *options, "科室室", *output]) == 2
    assert "no row has the field '科室室'" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".jsonl" and "rejects" not in path.name]


def test_the_command_writes_json_plots_and_their_numbers(
    tmp_path: Path, blank_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["department " + "abcdefgh"[n % 8] for n in range(50)]
    write(tmp_path / "raw.json", labels)
    plots, output = tmp_path / "plots", tmp_path / "stats.json"
    command = ["data", "stats", str(tmp_path / "raw.json"), "--label-field", "科室", "--plot", str(plots)]
    assert main([*command, "--output", str(output), "--model", str(blank_model)]) == 0
    found = json.loads(output.read_text("utf-8"))
    assert found["rows"] == 50 and found["tokens"]["least"] > found["question_characters"]["least"]
    for name in ("labels.png", "lengths.png"):
        assert (plots / name).read_bytes().startswith(b"\x89PNG") and (plots / name).stat().st_size > 5000
    with (plots / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in rows) == 50 and rows[0]["label"] == "department a"
    with (plots / "lengths.csv").open(encoding="utf-8-sig", newline="") as file:
        answers = {int(row["length"]): int(row["count"]) for row in csv.DictReader(file) if row["of"] == "answer"}
    assert answers == {2 * n: 1 for n in range(1, 51)}
    told = capsys.readouterr().out
    assert "50 rows" in told and "fields: 科室" in told


@pytest.mark.filterwarnings("error")  # matplotlib warns when a character is missing from the font
def test_no_label_is_drawn_as_a_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Chinese font is used where the machine has one; else the labels are numbered, and the user is told."""
    from trainer.runs.chart_font import font_for

    write(tmp_path / "raw.json", ["内科", "外科", "\U0001e900\U0001e901"])  # the last one: Adlam, in hardly any font
    command = ["data", "stats", str(tmp_path / "raw.json"), "--label-field", "科室", "--plot", str(tmp_path)]
    assert main(command) == 0
    assert ("no font of this machine" in capsys.readouterr().err) == (
        font_for(["内科外科\U0001e900\U0001e901"]) is None
    )
    assert (tmp_path / "labels.png").stat().st_size > 5000
    assert "内科" in (tmp_path / "labels.csv").read_text("utf-8-sig")


def test_a_font_has_every_character_that_it_is_chosen_for() -> None:
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    from trainer.runs.chart_font import font_for

    assert font_for(["department 1"]) == "DejaVu Sans"
    assert font_for(["\U0010fffd"]) is None  # private use
    chosen = font_for(["肝病科"])
    if chosen:  # the machine has a Chinese font
        path = font_manager.findfont(chosen, fallback_to_default=False)
        assert set(map(ord, "肝病科")) <= FT2Font(path, face_index=getattr(path, "face_index", 0)).get_charmap().keys()


def test_tools_that_are_no_json_are_counted_as_what_they_are(blank_model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "tools": "none"}) + "\n")
    assert main(["data", "stats", str(tmp_path / "a.jsonl"), "--model", str(blank_model)]) == 0
