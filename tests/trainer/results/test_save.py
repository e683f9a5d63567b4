import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from server.store.card import read_card
from server.store.hashes import weights_hash
from server.store.model_folder import check_model_folder
from server.store.registry import check_adapter_folder
from tests.trainer.families import FAMILIES, write_remote_code
from tests.trainer.method_matrix import config_of, loss_of, train_steps
from trainer.errors import NotServable
from trainer.methods.apply import apply_method
from trainer.methods.base_model import load_base
from trainer.results.card import make_card
from trainer.results.save import save_adapter, save_model, written_aside


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["Qwen2"].write(tmp_path_factory.mktemp("base"))


def trained(base: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = apply_method(load_base(base, dtype=torch.float32), config_of(base, options))
    train_steps(model, 0.02, count=2)
    return model


def test_an_adapter_is_two_small_files_and_its_card(base: Path, tmp_path: Path) -> None:
    run = {"id": "r1", "dataset_hash": "d", "base_weights_hash": weights_hash(base), "config": {"quantization_bit": 4}}
    save_adapter(
        trained(base), "qwen2-tiny", tmp_path / "adapter", card=lambda found: make_card(found, base, "qwen2-tiny", run)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    files = sorted((tmp_path / "adapter").iterdir())
    assert [file.name for file in files] == ["adapter_card.json", "adapter_config.json", "adapter_model.safetensors"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    check_adapter_folder(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 and all("lora_A" in name or "lora_B" in name for name in tensors)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "qwen2-tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    card = read_card(tmp_path / "adapter")
    assert (card.method, card.rank, card.run_id, card.dataset_hash) == ("lora", 4, "r1", "d")
    assert (card.quantization_bit, card.backends) == (4, ("hf", "vllm"))


def test_a_card_is_refused_for_a_base_that_was_not_trained_on(base: Path) -> None:
    with pytest.raises(NotServable, match="its weights are not those the run trained on"):
        make_card({"peft_type": "LORA", "r": 4}, base, "b", {"base_weights_hash": "0" * 64})


@pytest.mark.parametrize(("name", "what"), [("tokenizer_hash", "tokenizer"), ("chat_template_hash", "chat template")])
def test_a_card_is_refused_for_a_text_side_that_was_not_trained_with(base: Path, name: str, what: str) -> None:
    with pytest.raises(NotServable, match=f"its {what} has changed since the run trained with it"):
        make_card({"peft_type": "LORA", "r": 4}, base, "b", {name: "0" * 64})


def test_what_fails_half_way_leaves_the_old_folder_and_nothing_else(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    save_adapter(trained(base), "b", target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(found: Any) -> Any:
        raise NotServable("no")

    with pytest.raises(NotServable):
        save_adapter(trained(base, lora_rank=2), "b", target, card=fail)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    save_adapter(trained(base, lora_rank=2), "b", target)
    assert json.loads((target / "adapter_config.json").read_text())["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_aside_is_not_taken_for_a_part(tmp_path: Path) -> None:
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "stale").touch()
    with written_aside(tmp_path / "model") as aside:
        (aside / "new").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "options", [{"lora_init": "pissa"}, {"lora_init": "pissa_niter_4", "use_rslora": True}, {"lora_init": "olora"}]
)
def test_pissa_is_saved_as_a_plain_lora_on_the_untouched_base(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = trained(base, **options)
    save_adapter(model, "b", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    again = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), str(tmp_path / "adapter"))
    assert loss_of(again) == pytest.approx(loss_of(model), abs=1e-4)
    assert loss_of(model) < loss_of(load_base(base, dtype=torch.float32)) - 0.1


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_whole_model_keeps_the_base_s_dtype_and_text_files(base: Path, tmp_path: Path, method: str) -> None:
    half = tmp_path / "half"
    save_model(load_base(base, dtype=torch.float32), base, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (half / "chat_template.jinja").write_text("{{ messages }}")
    model = trained(half, finetuning_type=method)
    save_model(model, half, tmp_path / "model")
    check_model_folder(tmp_path / "model")
    assert {str(weight.dtype) for weight in load_file(tmp_path / "model" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}  # training may go on
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (half / name).read_bytes()
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")  # tied: saved once
    assert loss_of(load_base(tmp_path / "model", dtype=torch.float32)) == pytest.approx(loss_of(model), abs=0.1)


def test_a_model_with_code_of_its_own_keeps_its_code(tmp_path: Path) -> None:
    base = write_remote_code(tmp_path / "base")
    model = load_base(base, dtype=torch.float32, trust_remote_code=True)
    save_model(model, base, tmp_path / "model")
    assert (tmp_path / "model" / "modeling_tiny.py").read_bytes() == (base / "modeling_tiny.py").read_bytes()
    again = load_base(tmp_path / "model", dtype=torch.float32, trust_remote_code=True)
    assert loss_of(again) == loss_of(model)


def test_gathered_weights_hold_a_tied_head_once(base: Path, tmp_path: Path) -> None:
    """As ZeRO gathers them: every name has a tensor of its own."""
    model = trained(base, finetuning_type="full")
    gathered = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert torch.equal(gathered["lm_head.weight"], gathered["model.embed_tokens.weight"])
    save_model(model, base, tmp_path / "plain")
    save_model(model, base, tmp_path / "gathered", state_dict=gathered)
    plain, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "gathered"))
    assert again == plain and b"lm_head" not in plain[:4096]
