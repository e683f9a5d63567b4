import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from server.engine.backends.hf import adapter_files
from server.errors import ConfigError
from server.store.servability import BASE_CHANGING_INITS, HF_ONLY, MERGED_OPTIONS, servable
from tests.trainer.families import FAMILIES, write_remote_code
from tests.trainer.method_matrix import batch, config_of, loss_of, train_steps
from trainer.errors import ConfigFaults, DoesNotFit
from trainer.methods.apply import apply_method, describe
from trainer.methods.base_model import load_base, load_blank
from trainer.methods.faults import check_method
from trainer.methods.layer_names import resolve_targets

QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 3, "hidden_size": 64, "max_position_embeddings": 256}
# https://huggingface.co/Qwen/Qwen2-7B-Instruct/blob/main/config.json
QWEN2_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["Qwen2"].write(tmp_path_factory.mktemp("base"))


def adapted(base: Path, bits: int = 0, **options: Any) -> Any:
    torch.manual_seed(0)
    return apply_method(load_base(base, dtype=torch.float32, bits=bits), config_of(base, options))


def test_lora_on_every_linear_layer_of_qwen2_7b_has_20185088_parameters(base: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(QWEN2_7B)
        size = describe(apply_method(model, config_of(base, {"lora_rank": 8, "lora_alpha": 16})))
    assert (size.num_trained, size.num_base) == (20_185_088, 7_615_616_512)
    assert str(size) == "20,185,088 trained of 7,615,616,512 parameters (0.27%)"


def test_quantized_weights_are_counted_as_the_numbers_they_stand_for(base: Path) -> None:
    plain, quantized = describe(adapted(base)), describe(adapted(base, bits=4, finetuning_type="qlora"))
    assert plain == quantized


def test_full_trains_everything_and_freeze_the_last_layers_only(base: Path) -> None:
    assert all(weight.requires_grad for weight in adapted(base, finetuning_type="full").parameters())
    model = adapted(base, finetuning_type="freeze", freeze_trainable_layers=2)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1", "2"}
    assert trained == {name for name, _ in model.named_parameters() if ".layers.1." in name or ".layers.2." in name}


@pytest.mark.parametrize(
    ("wanted", "family", "expected"),
    [
        (("all-linear",), "qwen2", "all-linear"),
        (("all",), "gpt2", "all-linear"),
        ((), "qwen2", "all-linear"),
        (("decoder.layers.",), "qwen2", "all-linear"),
        (("q_proj,v_proj",), "qwen2", ["q_proj", "v_proj"]),
        (("q_proj", "v_proj"), "bloom", ["query_key_value"]),
        (("down_proj",), "opt", ["fc2"]),
        (("attention",), "gpt2", ["attn.c_attn", "attn.c_proj"]),
        (("mlp",), "glm", ["down_proj", "gate_up_proj"]),
        (("W_pack",), "baichuan", ["W_pack"]),
        (("q_proj", "o_proj"), "baichuan", ["W_pack", "o_proj"]),
        (("q_proj",), "never_heard_of", ["q_proj"]),
        ((r".*\.(q|k)_proj",), "qwen2", r".*\.(q|k)_proj"),
    ],
)
def test_lora_targets_are_put_into_the_family_s_own_names(wanted: tuple[str, ...], family: str, expected: Any) -> None:
    assert resolve_targets(wanted, family) == expected


def test_a_target_that_the_model_lacks_is_named_with_those_it_has(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no layer qproj; it has down_proj, .*q_proj.* or take all-linear"):
        adapted(base, lora_target=("qproj", "v_proj"))
    with pytest.raises(ConfigError, match="peft refuses it for this qwen2 model"):
        adapted(base, lora_target=("nothing.*",))


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "seq2seq": ({"is_encoder_decoder": True, "model_type": "t5"}, {}, "t5 model, which is sequence-to-sequence"),
    "images": ({"vision_config": {}, "model_type": "qwen2_vl"}, {}, "qwen2_vl model, which takes images or sound"),
    "classifier": ({"architectures": ["BertForSequenceClassification"]}, {}, "a causal language model"),
    "quantized, full": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"finetuning_type": "full"},
        "cannot train quantized weights",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, {}, "the base is quantized with gptq"),
    "other bits": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_bit": 8},
        "saved in 4 bits",
    ),
    "too many layers": ({}, {"finetuning_type": "freeze", "freeze_trainable_layers": 4}, "the base has 3 layers"),
    "ia3, unknown family": ({"model_type": "falcon"}, {"finetuning_type": "ia3"}, "feedforward_modules"),
    "no room": ({}, {"finetuning_type": "prompt", "pre_seq_len": 256}, "no room in the base's 256 positions"),
    "narrow embeddings": ({"word_embed_proj_dim": 32}, {"finetuning_type": "p_tuning"}, "take prefix"),
    "tied head": ({"tie_word_embeddings": True}, {"lora_target": ("lm_head",)}, "shares its weights"),
    "no such beginning": ({}, {"lora_init": "pisa"}, "'pisa': accepted are .*pissa"),
    "pissa, quantized": ({}, {"finetuning_type": "qlora", "lora_init": "pissa"}, "which quantized ones do not allow"),
    "no such peft type": (
        {},
        {"finetuning_type": "peft", "peft_config": {"peft_type": "LORRA"}},
        "'LORRA' is no method of peft; it has .*LORA",
    ),
    "no such peft option": (
        {},
        {"finetuning_type": "peft", "peft_config": {"peft_type": "vera", "rank": 3}},
        "peft_config: .*'rank'",
    ),
}


@pytest.mark.parametrize(("model_config", "options", "words"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_work_is_said_before_weights_are_loaded(
    model_config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigFaults, match=words):
        check_method(config_of(Path("base"), options), QWEN2 | model_config)


def test_all_faults_are_named_at_once() -> None:
    config = config_of(Path("base"), {"finetuning_type": "freeze", "freeze_trainable_layers": 9})
    with pytest.raises(ConfigFaults) as caught:
        check_method(config, QWEN2 | {"is_encoder_decoder": True})
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"finetuning_type": "full"}, None),
        ({"lora_rank": 24}, "QLOOP_MAX_ADAPTER_RANK=32"),
        ({"lora_rank": 16, "lora_init": "pissa"}, "QLOOP_MAX_ADAPTER_RANK=32"),
        ({"lora_rank": 600}, "vLLM serves ranks up to 512, this is 600"),
        ({"use_dora": True}, "merge the adapter into its base first"),
        ({"finetuning_type": "ptuning_v2"}, "served by the hf engine only"),
        ({"finetuning_type": "peft", "peft_config": {"peft_type": "LOHA"}}, "passed through untested"),
    ],
)
def test_who_will_serve_the_result_is_said_before_training(options: dict[str, Any], words: str | None) -> None:
    notes = check_method(config_of(Path("base"), options), QWEN2)
    assert (words is None and not notes) or any(words in note for note in notes if words)


def test_the_rules_of_servability_are_those_of_the_hf_engine() -> None:
    assert set(MERGED_OPTIONS) == set(adapter_files.REFUSED_OPTIONS)
    assert set(BASE_CHANGING_INITS) == set(adapter_files.BASE_CHANGING_STARTS)
    assert {"LORA", *HF_ONLY} == set(adapter_files._READERS)
    assert servable({"peft_type": "LORA", "r": 8}, "gpt2").backends == ("hf",)
    assert servable({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 600}}).backends == ("hf",)
    assert servable({"peft_type": "LORA", "r": 8, "bias": "all"}).backends == ()
    assert str(servable({"peft_type": "LOHA"})) == "after `merge` only"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_trains_evaluates_and_trains_again(base: Path, bits: int) -> None:
    model = adapted(base, bits=bits, finetuning_type="qlora", quantization_bit=bits)
    losses = [loss_of(model)]
    for _ in range(2):
        train_steps(model, 0.01, count=2)
        losses.append(loss_of(model))
    assert losses[0] > losses[1] > losses[2]
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"finetuning_type": "freeze"}, {"finetuning_type": "prompt"}]
)
def test_gradient_checkpointing_gives_the_same_gradients(base: Path, options: dict[str, Any]) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted(base, **options)
        train_steps(model, 0.01, count=1)  # away from LoRA's zeros
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(**batch()).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("options", [{}, {"lora_init": "pissa"}, {"use_dora": True}, {"finetuning_type": "ia3"}])
def test_an_untrained_adapter_changes_nothing(base: Path, options: dict[str, Any]) -> None:
    assert loss_of(adapted(base, **options)) == pytest.approx(loss_of(load_base(base, dtype=torch.float32)), abs=1e-4)


def test_a_peft_method_of_the_user_s_own_is_passed_through(base: Path) -> None:
    model = adapted(
        base, finetuning_type="peft", peft_config={"peft_type": "vera", "r": 4, "target_modules": ["q_proj"]}
    )
    assert model.peft_config["default"].peft_type == "VERA" and 0 < describe(model).num_trained < 1000
    with pytest.raises(ConfigError, match="finetuning_type=peft: peft refuses it for this qwen2 model"):
        adapted(base, finetuning_type="peft", peft_config={"peft_type": "LOHA", "target_modules": ["nothing"]})


def test_code_in_the_model_folder_runs_only_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_remote_code(tmp_path / "remote")
    with pytest.raises(ConfigError, match="is not run unasked; read the code, then set trust_remote_code=true"):
        load_base(folder, dtype=torch.float32)
    assert load_base(folder, dtype=torch.float32, trust_remote_code=True).config.model_type == "tiny_remote"


def test_weights_that_are_missing_are_an_error_and_never_random(base: Path, tmp_path: Path) -> None:
    model = load_base(base, dtype=torch.float32)
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match=r"lack 1 tensors of this architecture \(model.layers.2.mlp.up_proj.weight"):
        load_base(tmp_path, dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ConfigError, match="nonesuch"):
        load_base(tmp_path, dtype=torch.float32)


def test_a_model_that_memory_cannot_hold_is_exit_6(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2**44}))  # more than can be addressed
    with pytest.raises(DoesNotFit, match=r"memory ran out .*: lower per_device_train_batch_size") as caught:
        load_blank(tmp_path, dtype=torch.float32)
    assert caught.value.exit_code == 6


def test_checking_a_method_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer.results.card, trainer.results.adapter_folder\nfrom pathlib import Path\n"
        "from trainer.config import TrainConfig\nfrom trainer.methods.faults import check_method\n"
        "config = TrainConfig(model_name_or_path='m', train_file=('x',), use_dora=True)\n"
        "assert check_method(config, {'model_type': 'qwen2'})\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
