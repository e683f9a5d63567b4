import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from server.store.home import Home
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.data.rows import LedgerLine, Row
from trainer.examples.truncate import Limits
from trainer.runs.run_folder import read_lines
from trainer.stages.preference import Pair, PairLabels
from trainer.train import train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": "good " * (1 + n % 3), "rejected": "bad answer"} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config(model: Path, data: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_train_epochs": 8.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "max_length": 256,
        "lora_rank": 2,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
    }
    return TrainConfig(model_name_or_path=str(model), train_file=(str(data),), **defaults | options)


def metrics(run: Any, key: str) -> list[float]:
    return [line[key] for line in read_lines(run.path / "metrics.jsonl") if key in line]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dpo_prefers_the_chosen_answers(tiny_model: Path, data: Path, home: Home, method: str) -> None:
    run = train(config(tiny_model, data, stage="dpo", finetuning_type=method, val_size=2, eval_steps=4), home)
    assert metrics(run, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert metrics(run, "rewards/margins")[-1] > 0.05 and metrics(run, "loss")[-1] < 0.69
    assert metrics(run, "eval_loss")
    result = run.model / "model.safetensors" if method == "full" else run.adapter / "adapter_model.safetensors"
    assert len(load_file(result)) > 0 and not (run.adapter / "ref").exists()


def test_a_reward_model_scores_chosen_answers_higher(tiny_model: Path, data: Path, home: Home) -> None:
    run = train(config(tiny_model, data, stage="rm"), home)
    assert metrics(run, "accuracy")[-1] == 1.0 and metrics(run, "loss")[-1] < metrics(run, "loss")[0]
    assert any("score" in name for name in load_file(run.adapter / "adapter_model.safetensors"))


def test_both_answers_follow_the_prompt_that_would_be_served(blank_model: Path) -> None:
    renderer = ChatRenderer.load(blank_model)
    messages = ({"role": "user", "content": "你是谁？"},)
    row = Row("x", 3, messages, chosen="我是演示助手。", rejected="Who are you?")
    (pair,) = PairLabels(renderer, Limits(200)).of(row)
    assert isinstance(pair, Pair)
    assert pair.prompt_ids == renderer.render(list(messages))
    for ids, text in ((pair.chosen_ids, row.chosen), (pair.rejected_ids, row.rejected)):
        assert ids == [*renderer.tokenizer.encode_plain(text), renderer.turn_end_id]


def test_long_prompts_are_cut_alike_and_pairs_of_the_same_answer_dropped(blank_model: Path) -> None:
    labels = PairLabels(ChatRenderer.load(blank_model), Limits(120))
    messages = ({"role": "user", "content": "很" * 200},)
    line, pair = labels.of(Row("x", 1, messages, chosen="好", rejected="坏" * 10))
    assert isinstance(line, LedgerLine) and (line.action, line.code) == ("shortened", "too-long")
    assert isinstance(pair, Pair) and len(pair.prompt_ids) + len(pair.rejected_ids) <= 120
    for chosen, rejected, code in (("a", "a", "same-answers"), ("a", "b" * 200, "too-long")):
        (line,) = labels.of(Row("x", 1, messages, chosen=chosen, rejected=rejected))
        assert isinstance(line, LedgerLine) and (line.action, line.code) == ("dropped", code)
