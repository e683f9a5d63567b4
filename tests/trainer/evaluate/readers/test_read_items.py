"""Files together: ids, splits, examples, and a folder in which some files are broken."""

import json
from collections import Counter
from pathlib import Path

import pytest

from server.errors import ConfigError
from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.errors import DataError
from trainer.evaluate.items import ChoiceItem, ItemSet, TextItem
from trainer.evaluate.read_items import read_items, with_examples

QUESTION = {"question": "1+1?", "A": "1", "B": "2", "answer": "B"}


def examples(item_set: ItemSet) -> list[str]:
    return [item.source for item in item_set.items if isinstance(item, ChoiceItem | TextItem) and item.is_example]


def test_ids_are_the_same_on_every_run_and_wherever_the_files_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        files.write_all(tmp_path / name)
    one, two = (
        {item.item_id for found in read_items(tmp_path / name) for item in found.items} for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 30


def test_an_id_changes_with_the_question_and_not_with_its_place(tmp_path: Path) -> None:
    other = {**QUESTION, "question": "2+0?"}
    (before,) = read_items(files.write_lines(tmp_path / "exam.jsonl", [QUESTION, other]))
    (after,) = read_items(files.write_lines(tmp_path / "exam.jsonl", [{**QUESTION, "A": "0"}, other, QUESTION]))
    ids = [item.item_id for item in after.items]
    assert [item.item_id for item in before.items] == [ids[2], ids[1]]
    assert len(set(ids)) == 3


def test_a_repeated_question_gets_its_own_id(tmp_path: Path) -> None:
    (found,) = read_items(files.write_lines(tmp_path / "exam.jsonl", [QUESTION, QUESTION, QUESTION]))
    first, second, third = (item.item_id for item in found.items)
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_examples_come_from_the_dev_split_beside(tmp_path: Path) -> None:
    files.mmlu(tmp_path / "mmlu")
    whole, val, file = (read_items(tmp_path / path)[0] for path in ("mmlu", "mmlu/val", "mmlu/val/anatomy_val.csv"))
    for found in (whole, val, file):
        assert examples(found) == [str(tmp_path / "mmlu/dev/anatomy_dev.csv")]
        assert len(found.items) == 3
    assert {item.item_id for item in whole.items} == {item.item_id for item in file.items}


def test_examples_of_other_subjects_are_left_out(tmp_path: Path) -> None:
    files.mmlu(tmp_path)
    files.write(tmp_path / "dev/law_dev.csv", "Who?,a,b,c,d,A\n")
    (found,) = read_items(tmp_path / "val")
    assert {item.subject for item in found.items} == {"anatomy"}


def test_a_dev_split_alone_is_scored(tmp_path: Path) -> None:
    files.mmlu(tmp_path)
    (found,) = read_items(tmp_path / "dev")
    assert (len(found.items), examples(found)) == (1, [])


def test_the_first_items_become_examples_where_there_are_none(tmp_path: Path) -> None:
    rows = [{**QUESTION, "question": f"{n}+0?", "subject": "ab"[n % 2]} for n in range(8)]
    (found,) = read_items(files.write_lines(tmp_path / "exam.jsonl", rows))
    shown = with_examples(found, 3)
    assert [item.line for item in shown.items if isinstance(item, ChoiceItem) and item.is_example] == [1, 2, 3, 4, 5, 6]
    assert [item.item_id for item in shown.items] == [item.item_id for item in found.items]
    assert with_examples(found, 0) == found


def test_a_small_subject_keeps_a_scored_item(tmp_path: Path) -> None:
    subjects = ["one", *["few"] * 3, *["many"] * 9]
    rows = [{**QUESTION, "question": f"{n}+0?", "subject": subject} for n, subject in enumerate(subjects)]
    (found,) = read_items(files.write_lines(tmp_path / "exam.jsonl", rows))
    scored = Counter(item.subject for item in with_examples(found, 5).items if not getattr(item, "is_example", False))
    assert scored == {"one": 1, "few": 1, "many": 4}


def test_subjects_with_examples_and_open_questions_stay_as_they_are(tmp_path: Path) -> None:
    (mmlu,) = read_items(files.mmlu(tmp_path / "mmlu"))
    assert with_examples(mmlu, 5) == mmlu
    (bbh,) = read_items(files.bbh(tmp_path / "bbh"))
    assert with_examples(bbh, 3) == bbh
    (text,) = read_items(files.write_lines(tmp_path / "qa.jsonl", [{"prompt": "问", "response": "答"}]))
    assert with_examples(text, 1) == text


def test_a_broken_file_costs_itself_only(tmp_path: Path) -> None:
    files.write_lines(tmp_path / "a.jsonl", [QUESTION])
    (tmp_path / "b.xlsx").write_bytes(b"PK")
    (tmp_path / "c.json").write_text("")
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / ".hidden.json").write_text("[1]")
    found = {item_set.benchmark: item_set for item_set in read_items(tmp_path)}
    assert len(found["a"].items) == 1
    assert [(item.code, item.line) for name in "bc" for item in found[name].refused] == [("unreadable-file", 0)] * 2
    assert found.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("content", ["", "  \n", "[]", "{}"])
def test_a_file_with_nothing_in_it_is_named(content: str, tmp_path: Path) -> None:
    path = files.write(tmp_path / "empty.json", content)
    try:
        (found,) = read_items(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert not found.items
        assert found.refused[0].source == str(path)


def test_a_first_row_that_is_broken_does_not_rename_the_benchmark(tmp_path: Path) -> None:
    path = files.ceval(tmp_path / "c") / "val/law_val.csv"
    head, rows = path.read_text().split("\n", 1)
    (found,) = read_items(files.write(tmp_path / "law.csv", f"{head}\n7,too,short\n{rows}"))
    assert (found.benchmark, len(found.items), [item.code for item in found.refused]) == ("ceval", 2, ["wrong-columns"])


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json: cannot be read"):
        read_items(tmp_path / "no.json")
    with pytest.raises(DataError, match="holds no file of questions"):
        read_items(tmp_path)


def test_a_question_that_lost_its_options_is_no_open_question(tmp_path: Path) -> None:
    (found,) = read_items(
        files.write_lines(tmp_path / "exam.jsonl", [QUESTION, {"question": "为什么？", "answer": "B"}])
    )
    assert all(isinstance(item, ChoiceItem) for item in found.items)
    assert [item.code for item in found.refused] == ["no-options"]


def test_subjects_from_records_are_plain_names(tmp_path: Path) -> None:
    rows = [{**QUESTION, "subject": subject} for subject in ("law", "x" * 200, "a\nb", "", None, 5)]
    path = tmp_path / "exam.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), json.dumps({**QUESTION, "subject": "\ud800"})]))
    (found,) = read_items(path)
    assert [item.subject for item in found.items] == ["law", *["exam"] * 6]
