import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import check_model_folder
from server.store.registry import Registry
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.labels import IGNORED
from trainer.publish import publish
from trainer.train import TrainingFailed, collate, train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [{"instruction": f"question {n}", "output": "answer " * (n + 1)} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{bad\n", encoding="utf-8")
    return path


def config(model: Path, data: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_epochs": 2.0,
        "batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "max_length": 256,
    }
    return TrainConfig(model=str(model), data=(str(data),), **defaults | options)


def test_a_full_run_leaves_a_whole_servable_model(tiny_model: Path, data: Path, home: Home) -> None:
    run = train(config(tiny_model, data, finetuning="full", run_id="full"), home)
    assert run.path == home.runs / "full"
    check_model_folder(run.model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (run.model / name).read_bytes() == (tiny_model / name).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in run.model.iterdir()} == {0o644}
    record = json.loads((run.path / "run.json").read_text())
    assert (record["state"], record["output"], record["num_examples"], record["num_rejected"]) == (
        "done",
        "model",
        6,
        1,
    )
    assert record["config"]["learning_rate"] == 0.01 and record["pid"] > 0 and len(record["dataset_hash"]) == 64
    ledger = [json.loads(line) for line in (run.path / "rejects.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"][:17]) for line in ledger] == [(7, "is not valid JSON")]
    losses = [json.loads(line).get("loss") for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > [loss for loss in losses if loss][-1] > 0


@pytest.mark.parametrize("options", [{"finetuning": "full"}, {"lora_rank": 2, "lora_dropout": 0.1}])
def test_the_same_seed_gives_the_same_bytes(tiny_model: Path, data: Path, home: Home, options: dict[str, Any]) -> None:
    def weights(seed: int) -> bytes:
        run = train(config(tiny_model, data, seed=seed, **options), home)
        return next(run.path.glob("*/*.safetensors")).read_bytes()

    assert weights(1) == weights(1) != weights(2)


def test_adapters_are_equal_files_in_any_home(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    runs = [train(config(tiny_model, data, lora_rank=2), Home(tmp_path / name)) for name in ("one", "two")]
    first, second = ((run.adapter / "adapter_config.json").read_text() for run in runs)
    assert first == second
    assert json.loads(first)["base_model_name_or_path"] == "tiny-qwen2"
    assert sorted(path.name for path in runs[0].adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_lora_leaves_the_base_alone_and_publishes(tiny_model: Path, data: Path, home: Home) -> None:
    before = (tiny_model / "model.safetensors").read_bytes()
    run = train(config(tiny_model, data, lora_rank=2, run_id="r"), home)
    assert (tiny_model / "model.safetensors").read_bytes() == before
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert len(tensors) == 14 and any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)

    entry = publish(run.path, "tiny-lora", home)
    record = json.loads((run.path / "run.json").read_text())
    assert entry == Registry(home.adapters).get("tiny-lora")
    card = entry.card
    assert (card.base_model, card.method, card.rank, card.run_id) == ("tiny-qwen2", "lora", 2, "r")
    assert card.base_weights_hash == record["base_weights_hash"] and card.dataset_hash == record["dataset_hash"]
    renderer = ChatRenderer.load(tiny_model)
    assert renderer.turn_end_id in card.stop_token_ids and card.backends == ("hf", "vllm")


def test_publish_refuses_what_is_not_a_finished_adapter(
    tiny_model: Path, data: Path, home: Home, tmp_path: Path
) -> None:
    whole = train(config(tiny_model, data, finetuning="full", num_epochs=1.0), home)
    with pytest.raises(ConfigError, match="a whole model, not an adapter"):
        publish(whole.path, "x", home)
    run = train(config(tiny_model, data, num_epochs=1.0), home)
    with pytest.raises(ConfigError, match="its weights are not those the run trained on"):
        publish(run.path, "x", home, base=str(whole.model))
    run.record(state="running")
    with pytest.raises(ConfigError, match="is running, not done"):
        publish(run.path, "x", home)
    assert Registry(home.adapters).entries() == []


def test_pre_training_from_scratch(blank_model: Path, home: Home, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "你好，很高兴见到你。"}\n' * 20, encoding="utf-8")
    run = train(config(blank_model, text, stage="pt", finetuning="full", from_scratch=True, max_length=16), home)
    check_model_folder(run.model)


def test_logits_only_where_something_is_learned_give_the_model_s_own_loss(
    tiny_model: Path, data: Path, home: Home
) -> None:
    run = train(config(tiny_model, data, finetuning="full", num_epochs=1.0, batch_size=8, learning_rate=0.0), home)
    ours = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    renderer = ChatRenderer.load(tiny_model)
    rows = []
    for n in range(6):
        text = renderer.render_training(
            [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "answer " * (n + 1)}]
        )
        labels = [token if learn else IGNORED for token, learn in zip(text.token_ids, text.trained, strict=True)]
        rows.append({"input_ids": text.token_ids, "labels": labels})
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        assert ours == pytest.approx(model(**collate(rows, 0)).loss.item(), abs=1e-5)


def test_nan_stops_the_run_and_run_json_says_so(tiny_model: Path, data: Path, home: Home, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(TrainingFailed, match="the loss is nan at step 1"):
        train(config(broken, data, run_id="nan"), home)
    record = json.loads((home.runs / "nan" / "run.json").read_text())
    assert record["state"] == "failed" and "nan" in record["error"]
    assert not (home.runs / "nan" / "adapter").exists()


def test_nothing_usable_is_a_failed_run_that_names_the_ledger(tiny_model: Path, home: Home, tmp_path: Path) -> None:
    empty = tmp_path / "x.jsonl"
    empty.write_text("{bad\n")
    with pytest.raises(TrainingFailed, match=r"rejects\.jsonl"):
        train(config(tiny_model, empty, run_id="empty"), home)
    with pytest.raises(ConfigError, match="exists already"):
        train(config(tiny_model, empty, run_id="empty"), home)
    with pytest.raises(ConfigError, match="not a usable name"):
        train(config(tiny_model, empty, run_id="../x"), home)


def test_collate_pads_on_the_right_and_masks_the_padding() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8] * 16, "labels": [8] * 16}], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [9] * 13, [8] * 16]
    assert batch["labels"].tolist() == [[-100, 6, 7] + [-100] * 13, [8] * 16]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 13, [1] * 16]
    assert collate([{"input_ids": [5] * 17, "labels": [5] * 17}], 9)["input_ids"].shape == (1, 32)
