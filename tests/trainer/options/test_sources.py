"""Other tools' configurations, as their authors published them: understood with nothing but paths changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.errors import ConfigFaults
from trainer.machine import Machine
from trainer.options.resolve import Resolved, resolve
from trainer.options.sources import join_flags

CPU = Machine()
GPU = Machine(("NVIDIA A100",) * 4)

FULL_SFT = {
    "output_dir": "output/baichuan2-sft-1e5",
    "model_name_or_path": "Baichuan2-7B-Base",
    "deepspeed": "ds.json",
    "train_file": "data.jsonl",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-5,
    "max_seq_length": 512,
    "logging_steps": 10,
    "save_steps": 300,
    "save_total_limit": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 300,
    "gradient_checkpointing": False,
    "disable_tqdm": False,
    "optim": "adamw_hf",
    "seed": 42,
    "fp16": True,
    "report_to": "tensorboard",
    "dataloader_num_workers": 5,
    "save_strategy": "steps",
    "weight_decay": 0,
    "max_grad_norm": 1.0,
    "remove_unused_columns": False,
}
PTUNING = """\
#! /usr/bin/env bash
set -ex

PRE_SEQ_LEN=128
LR=2e-2
NUM_GPUS=1
MAX_SOURCE_LEN=1024
MAX_TARGET_LEN=128
DEV_BATCH_SIZE=1
GRAD_ACCUMULATION_STEPS=32
MAX_STEP=1000
SAVE_INTERVAL=500
AUTORESUME_FROM_CHECKPOINT=True
RUN_NAME=advertise_gen_pt
DATESTR=`date +%Y%m%d`
OUTPUT_DIR=output/${RUN_NAME}-${DATESTR}-${PRE_SEQ_LEN}-${LR}

mkdir -p $OUTPUT_DIR

torchrun --standalone --nnodes=1 --nproc_per_node=$NUM_GPUS ../finetune.py \\
    --quantization_bit 4 \\
    --train_format input-output \\
    --train_file $DATASET_PATH \\
    --preprocessing_num_workers 1 \\
    --model_name_or_path $BASE_MODEL_PATH \\
    --output_dir "$OUTPUT_DIR" \\
    --max_steps $MAX_STEP
"""
LLAMA_FACTORY = (
    "llamafactory-cli train --stage sft --do_train --model_name_or_path Qwen2.5-7B --dataset lawyerllama "
    "--dataset_dir DIR --template qwen --finetuning_type lora --output_dir Loras/law --overwrite_cache "
    "--overwrite_output_dir --cutoff_len 1024 --preprocessing_num_workers 16 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 1 --gradient_accumulation_steps 8 --lr_scheduler_type cosine --logging_steps 50 "
    "--warmup_steps 20 --save_steps 100 --eval_steps 50 --evaluation_strategy steps --load_best_model_at_end "
    "--learning_rate 5e-5 --num_train_epochs 3.0 --max_samples 1000 --val_size 0.1 --plot_loss --fp16 --lora_rank 4 "
    "--lora_alpha 8\n"
)
DEEPSPEED = (
    'deepspeed finetune_merge.py --report_to "none" --data_path $DATA --lazy_preprocess False '
    "--model_name_or_path $MODEL --output_dir output --model_max_length 2048 --num_train_epochs 24 "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --save_strategy epoch --save_total_limit 2 "
    '--learning_rate 1e-5 --lr_scheduler_type "cosine" --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-8 '
    "--max_grad_norm 1.0 --weight_decay 0.1 --warmup_ratio 0.01 --logging_steps 1 --gradient_checkpointing True "
    '--deepspeed "ds.json" --bf16 True --tf32 True\n'
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data and a DeepSpeed file, where relative paths of the scripts lead."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATA", "MODEL", "DATASET_PATH", "BASE_MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "scheduler": {"type": "WarmupLR"}})
    )
    return tmp_path


def script(text: str, *words: str, machine: Machine = GPU) -> Resolved:
    Path("run.sh").write_text(text)
    return resolve(Path("run.sh"), words, machine=machine)


def has(resolved: Resolved, **expected: Any) -> None:
    assert {key: getattr(resolved.config, key) for key in expected} == expected


def test_source_configs_run_as_written_in_json() -> None:
    Path("full.json").write_text(json.dumps(FULL_SFT))
    resolved = resolve(Path("full.json"), machine=GPU)
    has(
        resolved,
        finetuning_type="full",
        max_length=512,
        warmup_steps=300.0,
        optim="adamw_torch",
        fp16=True,
        report_to=("tensorboard",),
        deepspeed="ds.json",
        gradient_checkpointing=False,
        save_steps=300.0,
        output_dir="output/baichuan2-sft-1e5",
        hf_arguments={"dataloader_num_workers": 5},
    )
    assert resolved.notes == (
        "max_seq_length -> max_length: 512",
        "optim: adamw_hf -> adamw_torch",
        "remove_unused_columns: false is what the trainer always does",
        "finetuning_type: full (from deepspeed, with no method named)",
        "lr_scheduler_type: has no effect, ds.json names its own scheduler (WarmupLR)",
    )


def test_the_same_on_a_cpu_stops_by_name_or_runs_in_fp32() -> None:
    Path("full.json").write_text(json.dumps(FULL_SFT))
    with pytest.raises(ConfigFaults) as caught:
        resolve(Path("full.json"), machine=CPU)
    assert [fault.partition("=")[0] for fault in caught.value.faults] == ["fp16", "deepspeed"]
    resolved = resolve(Path("full.json"), ["--cpu-ok"], machine=CPU)
    has(resolved, fp16=False, deepspeed=None, finetuning_type="full", max_length=512)
    assert sum("cpu_ok" in note for note in resolved.notes) == 2


def test_source_configs_run_as_written_in_a_script() -> None:
    resolved = script(PTUNING, "DATASET_PATH=data.jsonl", "BASE_MODEL_PATH=THUDM/chatglm3-6b")
    has(
        resolved,
        finetuning_type="ptuning_v2",
        pre_seq_len=128,
        learning_rate=0.02,
        num_processes=1,
        max_source_length=1024,
        max_target_length=128,
        max_length=1152,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=32,
        max_steps=1000,
        save_steps=500.0,
        quantization_bit=4,
        resume="auto",
        run_id="advertise_gen_pt",
        train_file=("data.jsonl",),
        model_name_or_path="THUDM/chatglm3-6b",
    )
    assert resolved.config.output_dir and resolved.config.output_dir.endswith("-128-2e-2")
    assert "$" not in resolved.config.output_dir and "`" not in resolved.config.output_dir
    assert "LR -> learning_rate: 2e-2" in resolved.notes
    assert any("run.sh:2: `set`" in note for note in resolved.notes)


def test_a_variable_that_nobody_set_is_named_with_its_line() -> None:
    with pytest.raises(ConfigFaults) as caught:
        script(PTUNING)
    assert caught.value.faults == (
        "run.sh:20: $DATASET_PATH is not set: add DATASET_PATH=... or train_file=... to the command",
        "run.sh:20: $BASE_MODEL_PATH is not set: add BASE_MODEL_PATH=... or model_name_or_path=... to the command",
    )
    has(script(PTUNING, "--train_file", "data.jsonl", "model=m"), model_name_or_path="m")


def test_variables_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "data.jsonl")
    monkeypatch.setenv("MODEL", "Qwen/Qwen-14B")
    resolved = script(DEEPSPEED)
    has(
        resolved,
        finetuning_type="full",
        train_file=("data.jsonl",),
        model_name_or_path="Qwen/Qwen-14B",
        max_length=2048,
        warmup_steps=0.01,
        save_strategy="epoch",
        adam_beta2=0.95,
        bf16=True,
        report_to=(),
        num_train_epochs=24.0,
        hf_arguments={"tf32": True},
    )
    assert "warmup_ratio -> warmup_steps: 0.01" in resolved.notes


@pytest.mark.parametrize("has_info", [True, False])
def test_source_configs_run_as_written_with_llama_factory_s_flags(has_info: bool) -> None:
    folder = Path("some data")
    folder.mkdir()
    file = folder / ("law.json" if has_info else "lawyerllama.json")
    file.write_text("[]")
    if has_info:
        (folder / "dataset_info.json").write_text(json.dumps({"lawyerllama": {"file_name": "law.json"}}))
    resolved = script(LLAMA_FACTORY.replace("DIR", "'some data'"))
    has(
        resolved,
        train_file=(str(file),),
        finetuning_type="lora",
        lora_rank=4,
        lora_alpha=8,
        eval_strategy="steps",
        load_best_model_at_end=True,
        fp16=True,
        resume="never",
        max_samples=1000,
        val_size=0.1,
    )
    for key in ("do_train", "template", "overwrite_cache", "overwrite_output_dir", "evaluation_strategy", "cutoff_len"):
        assert sum(note.startswith(key) for note in resolved.notes) == 1, key


def test_a_registered_dataset_without_a_file_is_named() -> None:
    Path("dataset_info.json").write_text(json.dumps({"x": {"hf_hub_url": "a/b"}}))
    with pytest.raises(ConfigFaults, match="x has no file_name"):
        resolve(None, ["model=m", "dataset=x", "dataset_dir=."], machine=CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "0 training commands found"),
        ("torchrun a.py --seed 1\ntorchrun b.py\n", "2 training commands found"),
        ("torchrun a.py --seed 'open\n", "cannot be read as a shell command"),
        ("torchrun a.py stray\n", "'stray' belongs to no option"),
        ("torchrun a.py --seed 1 --seed 2\n", "seed is given twice"),
    ],
)
def test_a_script_that_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script(text)


def test_a_script_is_read_and_never_run(place: Path) -> None:
    script("touch ran\nX=$(touch ran)\ntorchrun a.py --train_file data.jsonl --model_name_or_path m\n")
    assert not (place / "ran").exists()


def test_options_that_a_script_s_user_mistyped_carry_the_line() -> None:
    with pytest.raises(ConfigFaults, match=r"run\.sh:2: unknown option 'learing_rate': did you mean learning_rate"):
        script("\ntorchrun a.py --learing_rate 1 --train_file data.jsonl --model_name_or_path m\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--a", "1", "b=2"], ["a=1", "b=2"]),
        (["--on", "b=2"], ["on=true", "b=2"]),
        (["--on", "False", "--a=x=y"], ["on=False", "a=x=y"]),
        (["--many", "x", "y", "b=2"], ["many=x,y", "b=2"]),
        (["--a-b", "-1"], ["a_b=-1"]),
        (["file.json", "--on"], ["file.json", "on=true"]),
    ],
)
def test_flags_become_words(arguments: list[str], words: list[str]) -> None:
    assert join_flags(arguments, frozenset({"on"}), frozenset({"many"})) == words
