"""A tiny Qwen2 folder with random weights, made here: no download."""

from pathlib import Path

import pytest

from server.store.home import Home
from trainer.demo.blank_model import Shape, write_blank_model

TINY = Shape(
    vocab_size=320, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, max_length=256
)
TEXTS = ["你是谁？", "我是演示助手。", "Who are you?", "I am a demo assistant.", "你好，很高兴见到你。"] * 4


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


@pytest.fixture(scope="session")
def blank_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "blank"
    write_blank_model(folder, TEXTS, TINY)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    write_blank_model(folder, TEXTS, TINY)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder
