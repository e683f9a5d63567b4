import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.config import TrainConfig, config_from, describe_options, load_config

GIVEN: dict[str, Any] = {"model": "m", "data": "a.jsonl"}


def test_words_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: [a.jsonl, b.jsonl]\nlearning_rate: 1e-3\nseed: 1\nfrom_scratch: false\n")
    config = load_config(file, ["seed=2", "num-epochs=0.5"])
    assert config == TrainConfig(
        model="m", data=("a.jsonl", "b.jsonl"), learning_rate=1e-3, seed=2, num_epochs=0.5, from_scratch=False
    )


def test_json_files_work_too(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(GIVEN | {"stage": "pt"}), encoding="utf-8-sig")
    assert load_config(file).stage == "pt"


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rat", "learning_rate"), ("epochs", "num_epochs"), ("lora_r", "lora_rank"), ("maxlength", "max_length")],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{key}': did you mean {suggestion}"):
        config_from(GIVEN | {key: 1})


def test_an_option_like_no_other_points_to_the_help() -> None:
    with pytest.raises(ConfigError, match="--help"):
        config_from(GIVEN | {"zzzzzz": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "x"}, "seed='x'.*int"),
        ({"seed": 1.5}, "seed=1.5.*int"),
        ({"seed": True}, "seed=True.*int"),
        ({"seed": None}, "seed=None.*int"),
        ({"learning_rate": "fast"}, "learning_rate='fast'.*float"),
        ({"learning_rate": "nan"}, "learning_rate=nan"),
        ({"learning_rate": "inf"}, "learning_rate=inf"),
        ({"warmup_ratio": 2}, "warmup_ratio=2.0.*at least 0 and at most 1"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"stage": "dpo"}, "stage='dpo'.*pt, sft"),
        ({"from_scratch": "yes"}, "from_scratch='yes'.*true and false"),
        ({"data": [1]}, r"data=\[1\].*file names"),
        ({"data": ""}, "data is not set"),
        ({"model": ""}, "model is not set"),
        ({"from_scratch": True, "finetuning": "lora"}, "finetuning=full"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from(GIVEN | values)


@pytest.mark.parametrize(("name", "text"), [("x.json", "{"), ("x.yaml", "a: ["), ("x.yaml", "- a"), ("x.json", "[]")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        load_config(tmp_path / name)
    with pytest.raises(ConfigError, match="key=value"):
        load_config(None, ["seed"])


def test_every_option_has_a_help_text() -> None:
    text = describe_options()
    for option in TrainConfig.__dataclass_fields__.values():
        assert len(option.metadata["help"]) > 10
        assert f"  {option.name}" in text
