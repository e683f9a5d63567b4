"""Before training: what each engine would refuse, and the cure."""

import re
from pathlib import Path
from typing import Any

import pytest

from server.store.home import Home
from trainer.__main__ import main
from trainer.config import TrainConfig
from trainer.verify.findings import Finding
from trainer.verify.plan import check_plan, plan_findings
from trainer.verify.target import Target

QWEN2 = {"model_type": "qwen2"}
BNB = {"model_type": "qwen2", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def findings(engine: str, max_rank: int | None = None, base: dict[str, Any] = QWEN2, **options: Any) -> list[Finding]:
    config = TrainConfig(model_name_or_path="m", train_file=("d",), **options)
    return list(plan_findings(config, base, Target(engine=engine, max_rank=max_rank)))


@pytest.mark.parametrize(
    ("engine", "max_rank", "options", "fault"),
    [
        ("hf", None, {"lora_rank": 600}, None),
        ("vllm", None, {"lora_rank": 16}, None),
        ("vllm", None, {"lora_rank": 600}, r"rank 600.*at most 512; set lora_rank=512"),
        ("vllm", 16, {"lora_rank": 32}, r"rank 32, .*at most 16; set lora_rank=16, or .*QLOOP_MAX_ADAPTER_RANK=32"),
        ("hf", 8, {"lora_rank": 9}, r"set lora_rank=8, or start the engine with QLOOP_MAX_ADAPTER_RANK=9"),
        ("vllm", 16, {"lora_rank": 24}, r"set lora_rank=16, or start the engine with QLOOP_MAX_ADAPTER_RANK=32"),
        ("vllm", 16, {"lora_rank": 16, "lora_init": "pissa"}, r"rank 32, because lora_init=pissa .*set lora_rank=8"),
        ("vllm", 16, {"lora_rank": 8, "lora_init": "pissa"}, None),
        ("hf", None, {"use_dora": True}, r"use_dora=True; leave out use_dora, or merge"),
        ("vllm", None, {"use_dora": True}, r"use_dora=True; leave out use_dora, or merge"),
        ("hf", None, {"finetuning_type": "prefix"}, None),
        ("vllm", None, {"finetuning_type": "prefix"}, r"take finetuning_type=lora, or serve it with QLOOP_ENGINE=hf"),
        ("vllm", None, {"finetuning_type": "p_tuning"}, r"QLOOP_ENGINE=hf"),
        ("vllm", None, {"finetuning_type": "prompt"}, r"QLOOP_ENGINE=hf"),
        ("vllm", None, {"finetuning_type": "ia3"}, r"QLOOP_ENGINE=hf"),
        ("hf", None, {"finetuning_type": "full"}, None),
        ("vllm", None, {"finetuning_type": "freeze"}, None),
        ("hf", None, {"finetuning_type": "qlora"}, None),
        (
            "vllm",
            None,
            {"finetuning_type": "peft", "peft_config": {"peft_type": "LORA", "r": 8, "modules_to_save": ["lm_head"]}},
            r"modules_to_save=\['lm_head'\]; leave out modules_to_save",
        ),
        (
            "hf",
            None,
            {"finetuning_type": "peft", "peft_config": {"peft_type": "LORA", "r": 8, "trainable_token_indices": [1]}},
            r"trainable_token_indices=\[1\]; use tokens that the base has",
        ),
        ("hf", None, {"finetuning_type": "peft", "peft_config": {"peft_type": "OFT"}}, r"OFT adapters; take .*merge"),
        ("hf", None, {"stage": "rm"}, r"stage=rm makes a reward model"),
    ],
)
def test_what_is_refused_and_how_to_mend_it(
    engine: str, max_rank: int | None, options: dict[str, Any], fault: str | None
) -> None:
    faults = [str(one) for one in findings(engine, max_rank, **options) if one.state == "fault"]
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1 and re.search(fault, faults[0]), faults


def test_a_bitsandbytes_base_is_not_vllms() -> None:
    options = {"finetuning_type": "lora"}
    assert [one.check for one in findings("vllm", base=BNB, **options) if one.state == "fault"] == ["base"]
    assert not [one for one in findings("hf", base=BNB, **options) if one.state == "fault"]


def test_the_command_names_the_fault_and_exits_8(
    tiny_model: Path, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = tmp_path / "c.yaml", tmp_path / "d.jsonl"
    data.write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    config.write_text(f"model_name_or_path: {tiny_model}\ntrain_file: {data}\nuse_dora: true\n", encoding="utf-8")
    words = ["verify", str(config), "--home", str(home.path)]
    assert main([*words, "--engine", "vllm"]) == 8
    told = capsys.readouterr()
    assert told.err.startswith("error: method: the vllm engine does not serve use_dora=True; leave out use_dora")
    assert main([*words, "--engine", "vllm", "use_dora=false"]) == 0
    assert main([*words, "use_dora=false", "lora_rank=16", "--max-rank", "8"]) == 8
    assert main(["verify", "no-such-run", "--home", str(home.path)]) == 2
    for more, said in (
        (["--tokens", "5"], "--tokens: is for a run or an adapter"),
        (["--server", "http://127.0.0.1:9", "--max-rank", "8"], "--max-rank: the server says itself"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


def test_another_base_than_the_servers(tiny_model: Path, home: Home) -> None:
    config = TrainConfig(model_name_or_path=str(tiny_model), train_file=("d",))
    target = Target(engine="hf", weights_hash="0" * 64, url="http://x", model="other")
    faults = [one for one in check_plan(config, home, target) if one.state == "fault"]
    assert len(faults) == 1 and "serves other with" in faults[0].detail
