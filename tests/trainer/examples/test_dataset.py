"""Which rows a run takes, and what it says when there are none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainConfig
from trainer.data.rows import Row
from trainer.errors import DataError
from trainer.examples.dataset import TrainingData, dataset_hash, load_data
from trainer.ledger import Ledger


def rows_file(path: Path, count: int) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"question": f"{path.stem} {n}", "answer": "a"}) + "\n" for n in range(count)))
    return str(path)


def config(*train: str, **options: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", train_file=train, max_reject_ratio=1.0, **options)


def questions(row: Row) -> Iterator[str]:
    yield row.messages[0]["content"]


def load(options: TrainConfig) -> TrainingData[str]:
    return load_data(options, questions, Ledger())


def test_how_much_of_each_file_is_taken_is_part_of_the_data_s_hash(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", 8)
    hashes = {dataset_hash(config(file, max_samples=most)) for most in (None, 2, 3)}
    hashes.add(dataset_hash(config(f"{file}#2")))
    assert len(hashes) == 4


def test_max_samples_is_of_each_file_and_a_limit_of_all_files_together_stays(tmp_path: Path) -> None:
    for name in "abc":
        rows_file(tmp_path / "many" / f"{name}.jsonl", 5)
    found = load(config(f"{tmp_path / 'many'}#7", max_samples=3)).train
    assert found == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2", "c 0"]


@pytest.mark.parametrize("name", ["train_file", "replay_file", "val_file"])
def test_files_without_a_usable_row_are_named_by_their_option(tmp_path: Path, name: str) -> None:
    """Else a run would go on without the evaluation, or the general data, that it was told to have."""
    (tmp_path / "bad.jsonl").write_text("{bad\n")
    files = {
        option: (rows_file(tmp_path / f"{option}.jsonl", 4),) for option in ("train_file", "replay_file", "val_file")
    }
    with pytest.raises(DataError, match=f"^{name}: none of its rows can be used"):
        load(
            TrainConfig(model_name_or_path="m", max_reject_ratio=1.0, **{**files, name: (str(tmp_path / "bad.jsonl"),)})
        )  # type: ignore[arg-type]


def test_holding_out_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="val_size=4 holds out all 4 rows"):
        load(config(rows_file(tmp_path / "a.jsonl", 4), val_size=4))
