import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from server.errors import ConfigError
from tests.services import ROOT
from trainer.config import TrainConfig
from trainer.errors import ConfigFaults
from trainer.machine import Machine
from trainer.options.aliases import NOTED, RULES
from trainer.options.checks import SCHEDULE_OPTIONS
from trainer.options.describe import describe, describe_options
from trainer.options.hf_names import FIXED, GONE, PASSED
from trainer.options.hf_table import TABLE, hf_table, installed_table
from trainer.options.resolve import Resolved, resolve
from trainer.options.translate import ALSO, HINTS, OPTIONS, REFUSED

CPU = Machine()
GPU = Machine(("NVIDIA H200",))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The two options without which nothing is accepted."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    return ["model_name_or_path=m", f"train_file={tmp_path / 'a.jsonl'}"]


def ask(*words: str, file: Path | None = None, machine: Machine = CPU, stage: str | None = None) -> Resolved:
    return resolve(file, words, stage=stage, machine=machine)


def faults(*words: str, file: Path | None = None, machine: Machine = CPU) -> tuple[str, ...]:
    with pytest.raises(ConfigFaults) as caught:
        ask(*words, file=file, machine=machine)
    return caught.value.faults


def test_words_win_over_the_file(tmp_path: Path, given: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-3\nseed: 1\nfrom_scratch: false\neval_strategy: no\n")
    resolved = ask(*given, "seed=2", "num-train-epochs=0.5", file=file)
    config = resolved.config
    assert (config.learning_rate, config.seed, config.num_train_epochs, config.eval_strategy) == (1e-3, 2, 0.5, "no")
    sources = resolved.sources
    assert (sources["seed"], sources["learning_rate"], sources["optim"]) == ("command line", f"{file}:1", "default")


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-3", "--plot_loss", "--fp16", "false", "seed=3"],
        ["learning_rate=1e-3", "plot_loss=true", "fp16=false", "seed=3"],
        ["--learning-rate=1e-3", "--seed", "3", "--plot_loss"],
    ],
)
def test_options_can_be_flags_or_words(given: list[str], words: list[str]) -> None:
    config = ask(*given, *words).config
    assert (config.learning_rate, config.plot_loss, config.fp16, config.seed) == (1e-3, True, False, 3)


def test_json_files_work_too_with_a_byte_order_mark(tmp_path: Path, given: list[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"stage": "pt", "max_steps": 3.0}), encoding="utf-8-sig")
    config = ask(*given, file=file).config
    assert (config.stage, config.max_steps) == ("pt", 3)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("learing_rate", "learning_rate"),
        ("learning_rat", "learning_rate"),
        ("lora_rnk", "lora_rank"),
        ("maxlength", "max_length"),
        ("cutof_len", "max_length"),
        ("dataloader_num_worker", "dataloader_num_workers"),
    ],
)
def test_a_typo_never_trains(given: list[str], key: str, suggestion: str) -> None:
    assert faults(*given, f"{key}=1") == (f"unknown option '{key}': did you mean {suggestion}?",)


def test_an_option_like_no_other_points_to_the_help(given: list[str]) -> None:
    (fault,) = faults(*given, "zzzzzz=1")
    assert "--help" in fault


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=x", "seed=x: a whole number"),
        ("seed=1.5", "seed=1.5: a whole number"),
        ("seed=true", "seed=true: a whole number"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("learning_rate=fast", "learning_rate=fast: a number"),
        ("learning_rate=nan", "learning_rate=nan: must be at least 0"),
        ("learning_rate=inf", "learning_rate=inf: must be at least 0"),
        ("num_train_epochs=0", "num_train_epochs=0: must be above 0"),
        ("max_reject_ratio=2", "max_reject_ratio=2: must be at least 0 and at most 1"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size=0: must be at least 1"),
        ("stage=dpoo", "stage=dpoo: accepted are pt, sft, dpo, rm, ppo"),
        ("finetuning_type=loraa", "finetuning_type=loraa: accepted are .*did you mean lora"),
        ("from_scratch=maybe", "from_scratch=maybe: accepted are true and false"),
        ("quantization_bit=5", "quantization_bit=5: accepted are 4, 8"),
        ("optim=adamw_torc", "optim=adamw_torc: did you mean adamw_torch"),
        ("lr_scheduler_type=cosin", "lr_scheduler_type=cosin: did you mean cosine"),
        ("warmup_ratio=20", "warmup_ratio=20: .*set warmup_steps"),
        ("peft_config=7", "peft_config=7: a mapping"),
        ("train_file=/no/such.jsonl", "train_file: /no/such.jsonl: no such file"),
        ("train_file=", "train_file is not set"),
        ("model_name_or_path=", "model_name_or_path is not set"),
        ("model_name_or_path=/no/such", "model_name_or_path: /no/such: no such folder"),
        ("dataloader_num_workers=two", "dataloader_num_workers=two: a number is expected"),
        ("tf32=perhaps", "tf32=perhaps: accepted are true and false"),
        ("remove_unused_columns=true", "remove_unused_columns=true: only false is possible"),
        ("push_to_hub=true", "push_to_hub=true: .*publish"),
        ("data_split=2,4,4", "data_split=2,4,4: .*data split"),
        ("resume=/no/such", "resume: /no/such: no such folder"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(given: list[str], word: str, message: str) -> None:
    key = word.partition("=")[0]
    words = [*(other for other in given if not other.startswith(f"{key}=")), word]
    (fault,) = faults(*words)
    assert re.match(message, fault), fault


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetuning_type=prefix", "gradient_checkpointing=true"], "gradient_checkpointing=true with .*prefix"),
        (["finetuning_type=ptuning_v2", "--gradient_checkpointing"], "gradient_checkpointing=true with .*ptuning_v2"),
        (["finetuning_type=full", "quantization_bit=4"], "quantization_bit=4 with finetuning_type=full"),
        (["finetuning_type=freeze", "load_in_8bit=true"], "quantization_bit=8 with finetuning_type=freeze"),
        (["bf16=true", "fp16=true", "cpu_ok=false"], "bf16=true with fp16=true|fp16=true: there is no GPU"),
        (["finetuning_type=prompt", "packing=true"], "packing=true with finetuning_type=prompt"),
        (["stage=dpo", "packing=true"], "packing=true with stage=dpo"),
        (["finetuning_type=full", "lora_rank=8"], "lora_rank with finetuning_type=full"),
        (["finetuning_type=lora", "pre_seq_len=8"], "pre_seq_len with finetuning_type=lora"),
        (["from_scratch=true"], "from_scratch=true with finetuning_type=lora"),
        (["finetuning_type=peft"], "finetuning_type=peft without a peft_type"),
        (["eval_strategy=steps"], "eval_strategy=steps without validation data"),
        (["load_best_model_at_end=true"], "load_best_model_at_end=true without evaluation"),
        (
            ["load_best_model_at_end=true", "val_size=0.1", "save_steps=70", "eval_steps=50"],
            "load_best_model_at_end=true with save_steps=70 and eval_steps=50",
        ),
        (["early_stopping_patience=3"], "early_stopping_patience=3 without evaluation"),
        (["max_steps=0"], "max_steps=0 trains nothing"),
        (["stage=ppo"], "stage=ppo without reward_model"),
        (["pref_beta=0.2"], "pref_beta with stage=sft"),
        (["stage=dpo", "neftune_noise_alpha=5"], "neftune_noise_alpha with stage=dpo: only stage pt, sft reads it"),
        (["stage=pt", "max_target_length=64"], "max_target_length with stage=pt"),
        (["stage=rm", "sample_prompts=hello"], "sample_prompts with stage=rm"),
        (["stage=ppo", "reward_model=r", "val_size=0.1"], "val_size with stage=ppo"),
        (["stage=dpo", "from_scratch=true", "finetuning_type=full"], "from_scratch=true with stage=dpo"),
        (["replay_ratio=0.2"], "replay_ratio without replay_file"),
        (["lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_type=cosine_with_min_lr needs min_lr_rate or min_lr"),
        (["lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type=warmup_stable_decay needs num_decay_steps"),
        (["lr_scheduler_type=reduce_lr_on_plateau"], "lr_scheduler_type=reduce_lr_on_plateau without evaluation"),
        (["eval_on_start=true"], "eval_on_start=true without evaluation"),
        (["stage=ppo", "reward_model=r", "num_processes=2"], "stage=ppo trains in one process"),
        (["stage=ppo", "reward_model=r", "max_length=64"], "ppo_max_new_tokens=128 with max_length=64 leaves no room"),
        (["sample_prompts=/no/such.txt"], "sample_prompts: /no/such.txt cannot be read"),
        (
            ["max_seq_length=512", "cutoff_len=1024"],
            "max_length is given twice: max_seq_length=512 and cutoff_len=1024",
        ),
        (["seed=1", "seed=2"], "seed is given twice: 1 and 2"),
        (["seed"], "'seed': options are written key=value"),
    ],
)
def test_impossible_pairs_stop(given: list[str], words: list[str], message: str) -> None:
    found = faults(*given, *words)
    assert any(re.match(message, fault) for fault in found), found


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learing_rate: 1\nseed: x\nfinetuning_type: prefix\ngradient_checkpointing: true\nfp16: true\n")
    found = faults("train_file=/no/such", file=file)
    for part in (
        f"{file}:1: unknown option 'learing_rate'",
        f"{file}:2: seed=x",
        "gradient_checkpointing=true with finetuning_type=prefix",
        "fp16=true: there is no GPU",
        "model_name_or_path is not set",
        "/no/such",
    ):
        assert any(fault.startswith(part) or part in fault for fault in found), part
    assert len(found) == 6


@pytest.mark.parametrize(
    ("word", "key", "changed", "note"),
    [
        ("fp16=true", "fp16", False, "fp16: true -> fp32"),
        ("deepspeed=zero3", "deepspeed", None, "deepspeed: zero3 -> left out"),
        ("fsdp=fsdp2", "fsdp", None, "fsdp: fsdp2 -> left out"),
        ("optim=paged_adamw_8bit", "optim", "adamw_torch", "optim: paged_adamw_8bit -> adamw_torch"),
        ("attention=flash_attention_2", "attention", "auto", "attention: flash_attention_2 -> auto"),
        ("tf32=true", "hf_arguments", {}, "tf32: true -> left out"),
        ("use_liger_kernel=true", "hf_arguments", {}, "use_liger_kernel: true -> left out"),
    ],
)
def test_what_needs_a_gpu_stops_by_name_or_is_replaced(
    given: list[str], word: str, key: str, changed: Any, note: str
) -> None:
    (fault,) = faults(*given, word)
    assert fault.startswith(f"{word}: ") and "--cpu-ok" in fault
    resolved = ask(*given, word, "--cpu-ok")
    assert getattr(resolved.config, key) == changed
    assert any(line.startswith(note) for line in resolved.notes)
    if key != "deepspeed":
        assert getattr(ask(*given, word, machine=GPU).config, key) != changed


def test_dora_on_int8_needs_a_gpu(given: list[str]) -> None:
    words = [*given, "use_dora=true", "load_in_8bit=true"]
    assert faults(*words)[0].startswith("quantization_bit=8: use_dora on int8 layers needs a GPU; leave it out")
    assert ask(*words, "--cpu-ok").config.quantization_bit == 4
    assert ask(*words, machine=GPU).config.quantization_bit == 8


def test_deepspeed_runs_on_a_cpu_when_processes_are_named(given: list[str]) -> None:
    assert ask(*given, "deepspeed=zero2", "num_processes=2").config.deepspeed == "zero2"


@pytest.mark.parametrize("value", ["fsdp2", "full_shard auto_wrap", "true"])
def test_fsdp_is_fsdp2_and_never_left_out_in_silence(given: list[str], value: str) -> None:
    assert ask(*given, f"fsdp={value}", machine=GPU).config.fsdp == "fsdp2"
    (fault,) = faults(*given, f"fsdp={value}", "num_processes=2")
    assert fault.startswith("fsdp=fsdp2: ")


def test_gradient_checkpointing_is_on_with_a_gpu_where_the_method_allows_it(given: list[str]) -> None:
    assert ask(*given, machine=GPU).config.gradient_checkpointing is True
    assert ask(*given, "finetuning_type=prefix", machine=GPU).config.gradient_checkpointing is None
    assert ask(*given).config.gradient_checkpointing is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cutoff_len=512"], {"max_length": 512}),
        (["warmup_ratio=0.1"], {"warmup_steps": 0.1}),
        (["warmup_ratio=0.1", "warmup_steps=0"], {"warmup_steps": 0.1}),
        (["warmup_steps=20"], {"warmup_steps": 20.0}),
        (["evaluation_strategy=no"], {"eval_strategy": "no"}),
        (["optim=adamw_hf"], {"optim": "adamw_torch"}),
        (["lora_target=all"], {"lora_target": ("all-linear",)}),
        (["lora_target_modules=q_proj,v_proj"], {"lora_target": ("q_proj", "v_proj")}),
        (["lora_dim=8"], {"finetuning_type": "lora", "lora_rank": 8}),
        (["q_lora=true"], {"finetuning_type": "qlora", "quantization_bit": 4}),
        (["finetuning_type=p-tuning-v2"], {"finetuning_type": "ptuning_v2"}),
        (["finetuning_type=oft"], {"finetuning_type": "peft", "peft_config": {"peft_type": "OFT"}}),
        (["num_virtual_tokens=16"], {"finetuning_type": "ptuning_v2", "pre_seq_len": 16}),
        (["quant_bits=8", "finetuning_type=qlora"], {"quantization_bit": 8}),
        (["resume_from_checkpoint=true"], {"resume": "auto"}),
        (["overwrite_output_dir=true"], {"resume": "never"}),
        (["mask_history=true"], {"loss_on": "last"}),
        (["report_to=none"], {"report_to": ()}),
        (["report_to=tensorboard"], {"report_to": ("tensorboard",)}),
        (
            ["zero_stage=2", "offload=true", "num_processes=2"],
            {"deepspeed": "zero2_offload", "finetuning_type": "full"},
        ),
        (
            ["dataloader_num_workers=5", "ddp_timeout=100"],
            {"hf_arguments": {"dataloader_num_workers": 5, "ddp_timeout": 100}},
        ),
        (["max_source_length=1024", "max_target_length=128"], {"max_length": 1152}),
        (["flash_attn=sdpa"], {"attention": "sdpa"}),
        (["max_samples=-1"], {"max_samples": None}),
        (["sample_prompts=one, two"], {"sample_prompts": ("one, two",)}),
    ],
)
def test_other_names_and_values(given: list[str], words: list[str], expected: dict[str, Any]) -> None:
    config = ask(*given, *words).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_each_mapped_key_is_printed_once(given: list[str]) -> None:
    notes = ask(*given, "optim=adamw_hf", "cutoff_len=512", "overwrite_cache=true", "remove_unused_columns=false").notes
    assert notes == (
        "optim: adamw_hf -> adamw_torch",
        "cutoff_len -> max_length: 512",
        "overwrite_cache: rows are streamed; nothing is cached",
        "remove_unused_columns: false is what the trainer always does",
    )


def test_the_command_s_stage_and_the_file_s_must_agree(tmp_path: Path, given: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage: pt\n")
    assert ask(*given, file=file, stage="pt").config.stage == "pt"
    with pytest.raises(ConfigFaults, match="stage=pt, but the command is dpo"):
        ask(*given, file=file, stage="dpo")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "cannot be parsed"),
        ("x.json", '{"seed": 1, "seed": 2}', "seed is given twice"),
        ("x.json", "[]", "a mapping"),
        ("x.json", '{"zero_optimization": {}}', "name it with deepspeed="),
        ("x.yaml", "a: [", "cannot be parsed"),
        ("x.yaml", "seed: 1\nseed: 2\n", "seed is given twice"),
        ("x.yaml", "- a", "a mapping"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        ask(file=tmp_path / name)


def test_a_dataclass_made_by_hand_is_checked_too() -> None:
    with pytest.raises(ConfigFaults) as caught:
        TrainConfig(bf16=True, fp16=True)
    assert len(caught.value.faults) == 3


def test_print_config_shows_every_option_with_its_source(given: list[str]) -> None:
    lines = describe(ask(*given, "cutoff_len=64")).splitlines()
    assert [line.split()[0] for line in lines] == list(OPTIONS)
    (line,) = (line for line in lines if line.startswith("max_length "))
    assert line.split() == ["max_length", "64", "command", "line", "(cutoff_len)"]


def test_every_option_has_a_help_text() -> None:
    text = describe_options()
    for option in OPTIONS.values():
        assert len(option.metadata["help"]) > 5
        assert f"  {option.name}" in text
    assert "{lora|" not in text and "|".join(get_args(HINTS["finetuning_type"])) in text


def test_the_table_of_training_arguments_is_that_of_the_installed_transformers() -> None:
    assert json.loads(TABLE.read_text("utf-8")) == installed_table(), "run: python -m trainer.options.hf_table"


def test_every_training_argument_has_one_fate() -> None:
    known = {"ours": set(OPTIONS), "also": set(ALSO), "rule": set(RULES), "noted": set(NOTED)}
    known |= {"passed": set(PASSED), "fixed": set(FIXED), "refused": set(REFUSED), "gone": set(GONE)}
    fates = {name: [fate for fate, names in known.items() if name in names] for name in installed_table()["arguments"]}
    assert {name: fate for name, fate in fates.items() if len(fate) != 1} == {}
    names = [name for group in known.values() for name in group]
    assert len(names) == len(set(names))
    assert set(installed_table()["arguments"]) >= PASSED


def test_a_fault_takes_under_two_seconds_and_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, time, trainer.__main__ as m; code = m.main(['train', 'learing_rate=1', 'model=m', 'data=x'])\n"
    code += "assert time.process_time() < 2.0\n"
    code += "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean learning_rate?" in done.stderr


def test_the_example_in_the_documentation_is_what_the_defaults_are(given: list[str]) -> None:
    file = ROOT / "docs" / "lora-sft.yaml"
    config, plain = ask(*given, file=file).config, ask(*given).config
    differing = {name for name in OPTIONS if getattr(config, name) != getattr(plain, name)}
    assert differing == {"val_size"}


def test_every_schedule_of_transformers_is_made_or_refused_by_name(given: list[str]) -> None:
    """Nothing is left for the moment when the model is loaded."""
    import torch
    from transformers import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    for name in hf_table().schedulers:
        words = [*given, f"lr_scheduler_type={name}", "val_size=0.5"]
        options = dict.fromkeys(SCHEDULE_OPTIONS.get(name, ())[:1], 1)
        if options:
            assert "lr_scheduler_kwargs" in faults(*words)[0]
            words.append(f"lr_scheduler_kwargs={json.dumps(options)}")
        passed = ask(*words).config.hf_arguments.get("lr_scheduler_kwargs", {})
        get_scheduler(name, torch.optim.SGD([weight], lr=1.0), 1, 10, dict(passed))
