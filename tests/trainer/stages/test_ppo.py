import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from server.errors import ConfigError
from server.store.home import Home
from trainer.config import TrainConfig
from trainer.errors import Stopped
from trainer.publish import publish
from trainer.results.merge import merge
from trainer.runs.run_folder import read_lines
from trainer.stages.answers import gae, whitened
from trainer.stages.ppo import PpoSettings, PpoTrainer
from trainer.train import train

SHARED: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_length": 128,
    "lora_rank": 2,
    "save_strategy": "no",
    "plot_loss": False,
    "disable_tqdm": True,
}


def test_advantages_are_those_of_the_definition() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 2.0]])
    values = torch.tensor([[0.2, 0.4, 9.0], [0.1, 0.3, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = gae(rewards, values * mask, mask, 0.9)
    deltas = [0.5 + 0.3 - 0.1, 0.0 + 0.5 - 0.3, 2.0 - 0.5]
    wanted = [deltas[0] + 0.9 * (deltas[1] + 0.9 * deltas[2]), deltas[1] + 0.9 * deltas[2], deltas[2]]
    assert found[1].tolist() == pytest.approx(wanted)
    assert found[0].tolist() == pytest.approx([0.4 - 0.2 + 0.9 * 0.6, 0.6, 0.0])
    white = whitened(found, mask)[mask]
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_a_rewarded_token_is_said_more_often(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    wanted = 65
    rewards: list[float] = []

    def score(conversations: list[list[int]]) -> torch.Tensor:
        found = torch.tensor([float(sum(token == wanted for token in ids[4:])) for ids in conversations])
        rewards.append(found.mean().item())
        return found

    trainer = PpoTrainer(
        model,
        settings=PpoSettings(max_new_tokens=8, stop_id=319, pad_id=317, kl_price=0.01),
        score=score,
        reference=lambda: nullcontext(base),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            use_cpu=True,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"token_ids": [5, 6, 7, 8 + n % 3], "row": n} for n in range(64)],
    )
    trainer.train()
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert first < 0.5 and last > first + 1.0, (first, last)


def test_a_run_against_a_reward_model(tiny_model: Path, home: Home, tmp_path: Path) -> None:
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad answer"} for n in range(4)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    asked = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(8)]
    prompts.write_text("\n".join(map(json.dumps, asked)))
    shared = SHARED | {"model_name_or_path": str(tiny_model), "num_train_epochs": 1.0}
    train(TrainConfig(**shared, train_file=(str(pairs),), stage="rm", run_id="reward"), home)
    options: dict[str, Any] = {"stage": "ppo", "train_file": (str(prompts),), "ppo_max_new_tokens": 6}
    run = train(TrainConfig(**shared, **options, reward_model="reward", run_id="ppo"), home)
    lines = read_lines(run.path / "metrics.jsonl")
    assert len([line for line in lines if "reward" in line]) == 2
    assert not any("value_head" in name for name in _tensor_names(run.adapter / "adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="no such run"):
        train(TrainConfig(**shared, **options, reward_model="nothing", run_id="x"), home)
    with pytest.raises(ConfigError, match=r"lack 1 tensors of this architecture \(score.weight"):
        train(TrainConfig(**shared, **options, reward_model=str(tiny_model), run_id="y"), home)
    for make in (
        lambda: merge(home.runs / "reward", tmp_path / "merged", home),
        lambda: publish(home.runs / "reward", "r", home),
    ):
        with pytest.raises(ConfigError, match="a reward model scores answers"):
            make()
    assert not (tmp_path / "merged").exists() and not list(home.adapters.iterdir())


class Steady:
    """A score that likes long answers, and stops the run at its call number `stop_at`."""

    def __init__(self, stop_at: int = 0) -> None:
        self._left = stop_at

    def __call__(self, conversations: list[list[int]]) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor([float(sum(ids) % 7) for ids in conversations])


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    asked = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return str(tmp_path / "prompts.jsonl")


def ppo(model: Path, prompts: str, run_id: str, **options: Any) -> TrainConfig:
    more = {"stage": "ppo", "reward_model": "r", "ppo_max_new_tokens": 6, "lora_dropout": 0.0, "learning_rate": 0.01}
    defaults = SHARED | more | {"num_train_epochs": 2.0, "run_id": run_id}
    return TrainConfig(model_name_or_path=str(model), train_file=(prompts,), **defaults | options)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda stop_at: monkeypatch.setattr("trainer.stages.ppo.load_reward", lambda *_: Steady(stop_at))


def test_every_answer_is_learned_from_however_a_step_is_cut(
    tiny_model: Path, prompts: str, home: Home, steady: Callable[[int], None]
) -> None:
    steady(0)
    whole = train(ppo(tiny_model, prompts, "whole"), home)
    cut = train(ppo(tiny_model, prompts, "cut", per_device_train_batch_size=1, gradient_accumulation_steps=4), home)
    weights, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, cut))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-5, rtol=0)
    assert any(weight.abs().max() > 1e-3 for name, weight in weights.items() if "lora_B" in name)
    found = [
        [line["loss"] for line in read_lines(run.path / "metrics.jsonl") if "loss" in line] for run in (whole, cut)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-4) and len(found[0]) == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_goes_on_with_its_value_head(
    tiny_model: Path, prompts: str, home: Home, steady: Callable[[int], None], method: str
) -> None:
    options: dict[str, Any] = {"finetuning_type": method, **({"lora_dropout": 0.05} if method == "full" else {})}
    steady(0)
    whole = train(ppo(tiny_model, prompts, "whole", **options), home)
    steady(2)
    with pytest.raises(Stopped):
        train(ppo(tiny_model, prompts, "stopped", **options), home)
    steady(0)
    again = train(ppo(tiny_model, prompts, "stopped", **options), home)
    result = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[method]
    assert (again.path / result).read_bytes() == (whole.path / result).read_bytes()


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())
