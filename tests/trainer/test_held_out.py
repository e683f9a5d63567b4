"""A run's held-out rows, found again: exactly those that training validated on."""

import json
from pathlib import Path

import pytest

from server.store.home import Home
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.errors import DataError
from trainer.held_out import MAX_ROWS, write_held_out
from trainer.runs.run_folder import read_run
from trainer.train import train


def rows(path: Path, count: int) -> Path:
    lines = [{"question": f"问题 {n}？", "answer": f"回答 {n}。"} for n in range(count)]
    lines[3]["answer"] = ""  # refused: it takes no part in the draw
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def config(model: Path, data: Path, **options: object) -> TrainConfig:
    given = {"max_steps": 1, "save_strategy": "no", "plot_loss": False, "run_id": "r", "max_reject_ratio": 0.5}
    return TrainConfig(model_name_or_path=str(model), train_file=(str(data),), **{**given, **options})  # type: ignore[arg-type]


def test_they_are_those_that_training_validated_on(
    tiny_model: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    import trainer.stages.text as stage

    load = stage.load_data

    def spy(*arguments: object) -> object:
        data = load(*arguments)  # type: ignore[arg-type]
        seen.append(list(data.validation))
        return data

    monkeypatch.setattr(stage, "load_data", spy)
    run = train(config(tiny_model, rows(tmp_path / "d.jsonl", 40), val_size=6), home)
    target = tmp_path / "held_out.jsonl"
    record = read_run(run.path)
    assert write_held_out(record, tiny_model, target) == record["num_validation_examples"] == 6
    held = [json.loads(line)["messages"] for line in target.read_text("utf-8").splitlines()]
    numbers = [int(messages[0]["content"].strip("问题？ ")) for messages in held]
    # Example i is the i-th usable row: row 3 was refused, so those behind it moved up by one.
    assert [number - (number > 3) for number in numbers] == seen[0]
    assert ChatRenderer.load(tiny_model).render(held[0])  # rows as any task reads them


def test_no_rows_changed_rows_and_many_rows(tiny_model: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    from trainer.examples.dataset import dataset_hash

    data, target = rows(tmp_path / "d.jsonl", 20), tmp_path / "h.jsonl"
    without = {"config": asdict(config(tiny_model, data, val_size=0))}
    assert write_held_out(without, tiny_model, target) == 0 and not target.exists()
    given = config(tiny_model, data, val_size=5)
    record = {"config": json.loads(json.dumps(asdict(given))), "dataset_hash": dataset_hash(given)}
    assert write_held_out(record, tiny_model, target) == 5
    data.write_text(data.read_text("utf-8") + '{"question": "q", "answer": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="have changed since"):
        write_held_out(record, tiny_model, target)
    data.unlink()
    with pytest.raises(DataError, match="cannot be read again"):
        write_held_out(record, tiny_model, target)
    many = rows(tmp_path / "m.jsonl", 300)
    assert write_held_out({"config": asdict(config(tiny_model, many, val_size=250))}, tiny_model, target) == MAX_ROWS
