import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import check_model_folder
from server.store.registry import Registry
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.demo.blank_model import write_blank_model
from trainer.errors import DataError, Diverged, DoesNotFit, NotServable
from trainer.examples.sequences import IGNORED
from trainer.publish import publish
from trainer.runs.run_folder import RunFolder, read_lines, read_run
from trainer.train import train

from .conftest import TEXTS, TINY

NUM_ROWS = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [{"instruction": f"question {n}", "output": "answer " * (n + 1)} for n in range(NUM_ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{bad\n", encoding="utf-8")
    return path


def config(model: Path, data: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "max_length": 256,
        "max_reject_ratio": 0.2,
        "lora_rank": 2,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
    }
    return TrainConfig(model_name_or_path=str(model), train_file=(str(data),), **defaults | options)


def losses(run: RunFolder, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(run.path / "metrics.jsonl") if key in line]


def test_a_full_run_leaves_a_whole_servable_model(tiny_model: Path, data: Path, home: Home) -> None:
    run = train(config(tiny_model, data, finetuning_type="full", run_id="full"), home)
    assert run.path == home.runs / "full"
    check_model_folder(run.model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (run.model / name).read_bytes() == (tiny_model / name).read_bytes()
    record = json.loads((run.path / "run.json").read_text())
    assert (record["state"], record["output"], record["num_examples"], record["num_rejected"]) == (
        "done",
        "model",
        6,
        1,
    )
    assert record["config"]["learning_rate"] == 0.01 and len(record["dataset_hash"]) == 64
    ledger = [json.loads(line) for line in (run.path / "rejects.jsonl").read_text().splitlines()]
    assert [(line["line"], line["action"], line["code"]) for line in ledger] == [(7, "dropped", "bad-json")]
    assert losses(run)[0] > losses(run)[-1] > 0


@pytest.mark.parametrize("options", [{"finetuning_type": "full"}, {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0}])
def test_the_same_seed_gives_the_same_bytes(tiny_model: Path, data: Path, home: Home, options: dict[str, Any]) -> None:
    def weights(name: str, seed: int) -> bytes:
        run = train(config(tiny_model, data, seed=seed, run_id=name, **options), home)
        return next(run.path.glob("*/*.safetensors")).read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_adapters_are_equal_files_in_any_home(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    runs = [train(config(tiny_model, data, run_id="r"), Home(tmp_path / name)) for name in ("one", "two")]
    first, second = ((run.adapter / "adapter_config.json").read_text() for run in runs)
    assert first == second
    assert json.loads(first)["base_model_name_or_path"] == "tiny-qwen2"
    assert {path.name for path in runs[0].adapter.iterdir()} == {
        "adapter_card.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_lora_leaves_the_base_alone_and_publishes(tiny_model: Path, data: Path, home: Home) -> None:
    before = (tiny_model / "model.safetensors").read_bytes()
    run = train(config(tiny_model, data, run_id="r"), home)
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


def test_a_template_that_changed_after_training_stops_publish(
    tiny_model: Path, data: Path, home: Home, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = train(config(base, data, max_steps=1), home)
    elsewhere = shutil.copytree(run.adapter, tmp_path / "elsewhere")
    with (base / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("{{- 'one more' }}")
    for folder in (run.path, elsewhere):  # known from the run, and from the adapter's own card
        with pytest.raises(NotServable, match="its chat template has changed since") as caught:
            publish(folder, "tiny-lora", home, base=str(base))
        assert caught.value.exit_code == 8
    assert not Registry(home.adapters).entries()


def test_pre_training_from_scratch(blank_model: Path, home: Home, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"你好，很高兴见到你。{n}"}, ensure_ascii=False) for n in range(20)]
    text.write_text("\n".join(rows), encoding="utf-8")
    model = tmp_path / "no-template"
    shutil.copytree(blank_model, model, ignore=shutil.ignore_patterns("chat_template.jinja"))
    options = {"stage": "pt", "finetuning_type": "full", "from_scratch": True, "max_length": 64}
    run = train(config(model, text, sample_prompts=("你好，",), **options), home)
    check_model_folder(run.model)
    assert losses(run)[0] > losses(run)[-1]
    samples = read_lines(run.path / "samples.jsonl")
    assert samples[0]["prompt"] == "你好，" and samples[-1]["answer"], "a text is gone on from as it is"


def test_rows_with_tools_train_a_model_whose_template_has_no_place_for_them(home: Home) -> None:
    data, model = home.path / "tools.jsonl", home.models / "long"
    write_blank_model(model, TEXTS, replace(TINY, max_length=1024))
    turns = (("human", "Rain?"), ("function_call", '{"name": "rain", "arguments": {"city": "Oslo"}}'))
    spoken = [{"from": who, "value": text} for who, text in (*turns, ("observation", "dry"), ("gpt", "No."))]
    tools = json.dumps([{"name": "rain", "parameters": {"type": "object"}}])
    data.write_text(json.dumps({"conversations": spoken, "tools": tools}) + "\n")
    options = {"finetuning_type": "full", "from_scratch": True, "max_steps": 1, "max_length": 1024}
    run = train(config(model, data, **options), home)
    assert read_run(run.path)["num_examples"] == 1
    assert [line["code"] for line in read_lines(run.path / "rejects.jsonl")] == ["tools-as-text"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_first_loss_is_the_model_s_own(tiny_model: Path, data: Path, home: Home, packing: bool) -> None:
    options = {"finetuning_type": "full", "num_train_epochs": 1.0, "learning_rate": 0.0}
    run = train(config(tiny_model, data, per_device_train_batch_size=8, packing=packing, **options), home)
    assert losses(run)[0] == pytest.approx(stock_loss(tiny_model, range(NUM_ROWS)), abs=1e-5)


def stock_loss(folder: Path, numbers: Any) -> float:
    """Mean loss of the rows' answers, with transformers alone."""
    renderer = ChatRenderer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for n in numbers:
        answer = {"role": "assistant", "content": "answer " * (n + 1)}
        text = renderer.render_training([{"role": "user", "content": f"question {n}"}, answer])
        labels = [token if learn else IGNORED for token, learn in zip(text.token_ids, text.trained, strict=True)]
        with torch.no_grad():
            logits = model(torch.tensor([text.token_ids])).logits[0]
        total += F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum").item()
        count += sum(text.trained)
    return total / count


def test_validation_rows_are_held_out_and_perplexity_is_the_loss_s_exponential(
    tiny_model: Path, data: Path, home: Home
) -> None:
    options = {"val_size": 2, "eval_steps": 1, "learning_rate": 0.0, "num_train_epochs": 1.0}
    run = train(config(tiny_model, data, **options), home)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["num_examples"], record["num_validation_examples"]) == (4, 2)
    line = next(line for line in read_lines(run.path / "metrics.jsonl") if "eval_loss" in line)
    assert line["perplexity"] == pytest.approx(torch.tensor(line["eval_loss"]).exp().item(), rel=1e-5)
    pairs = [stock_loss(tiny_model, (a, b)) for a in range(NUM_ROWS) for b in range(a)]
    assert min(abs(line["eval_loss"] - loss) for loss in pairs) < 1e-5


def test_the_best_checkpoint_is_the_result_and_training_stops_early(tiny_model: Path, data: Path, home: Home) -> None:
    options = {"val_size": 2, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 40.0}
    options |= {"learning_rate": 0.3, "load_best_model_at_end": True, "early_stopping_patience": 2}
    run = train(config(tiny_model, data, finetuning_type="full", lr_scheduler_type="constant", **options), home)
    found = losses(run, "eval_loss")
    assert len(found) < 40 and min(found) not in found[-2:]
    again = train(
        config(
            run.model, data, finetuning_type="full", val_size=2, eval_steps=1, learning_rate=0.0, num_train_epochs=1.0
        ),
        home,
    )
    assert losses(again, "eval_loss")[0] == pytest.approx(min(found), abs=1e-5)


def test_replay_rows_are_mixed_in_and_files_can_be_cut(
    tiny_model: Path, data: Path, home: Home, tmp_path: Path
) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text("\n".join(json.dumps({"instruction": f"g{n}", "output": f"h{n}"}) for n in range(50)))
    run = train(config(tiny_model, data, replay_file=(str(general),), replay_ratio=0.25, max_samples=6), home)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["num_examples"], record["num_replayed"]) == (8, 2)


def test_divergence_is_loud(tiny_model: Path, data: Path, home: Home, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(Diverged, match=r"loss is nan in step 1.*chat\.jsonl:1, 2, 3, 4, 5, 6\b"):
        train(config(broken, data, run_id="nan", per_device_train_batch_size=6), home)
    record = json.loads((home.runs / "nan" / "run.json").read_text())
    assert record["state"] == "failed" and "nan" in record["error"] and record["exit_code"] == 5
    assert not (home.runs / "nan" / "adapter").exists()
    assert "0.0" not in (home.runs / "nan" / "events.jsonl").read_text()


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights(
    tiny_model: Path, data: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss may be finite where its gradient is not: here the square root of nothing."""
    from trainer.steps.loop import ExactTrainer

    summed = ExactTrainer._summed_loss

    def bad(self: Any, model: Any, inputs: Any) -> Any:
        weight = next(p for p in model.parameters() if p.requires_grad)
        return summed(self, model, inputs) + (weight.sum() * 0.0).sqrt() * (self.state.global_step > 0)

    monkeypatch.setattr(ExactTrainer, "_summed_loss", bad)
    with pytest.raises(Diverged, match="the gradient is nan in step"):
        train(config(tiny_model, data), home)


def test_nothing_usable_names_a_row_and_too_many_refused_stop_before_the_model(
    tiny_model: Path, data: Path, home: Home, tmp_path: Path
) -> None:
    empty = tmp_path / "x.jsonl"
    empty.write_text("{bad\n")
    with pytest.raises(DataError, match=r"none of the 1 rows.*x\.jsonl:1 bad-json"):
        train(config(tiny_model, empty, run_id="empty"), home)
    with pytest.raises(DataError, match="max_reject_ratio"):
        train(config(tiny_model, data, run_id="strict", max_reject_ratio=0.05), home)
    with pytest.raises(ConfigError, match="not a usable name"):
        train(config(tiny_model, empty, run_id="../x"), home)


def test_packing_that_a_model_cannot_do_is_refused(tiny_model: Path, data: Path, home: Home) -> None:
    options = {"finetuning_type": "prompt", "pre_seq_len": 4}
    with pytest.raises(ConfigError, match="packing=true"):
        train(config(tiny_model, data, packing=True, **options), home)
    run = train(config(tiny_model, data, **options), home)
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_memory_that_runs_out_is_exit_6_with_the_cure(
    tiny_model: Path, data: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nmore")

    monkeypatch.setattr("transformers.Trainer.training_step", out_of_memory)
    with pytest.raises(DoesNotFit, match=r"memory ran out \(CUDA out of memory.*gradient_checkpointing=true"):
        train(config(tiny_model, data, run_id="r"), home)
    record = read_run(home.runs / "r")
    assert (record["state"], record["exit_code"]) == ("failed", 6)


def test_what_an_optimizer_or_a_schedule_refuses_is_one_line(tiny_model: Path, data: Path, home: Home) -> None:
    options: dict[str, Any] = {
        "lr_scheduler_type": "polynomial",
        "hf_arguments": {"lr_scheduler_kwargs": {"lr_end": 1}},
    }
    with pytest.raises(ConfigError, match=r"^lr_scheduler_type=polynomial: transformers refuses it"):
        train(config(tiny_model, data, **options), home)
