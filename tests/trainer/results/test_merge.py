import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import check_model_folder
from server.store.registry import RegistryError
from tests.trainer.families import FAMILIES
from tests.trainer.method_matrix import config_of, loss_of, train_steps
from trainer.__main__ import main
from trainer.errors import NotServable
from trainer.methods.apply import apply_method
from trainer.methods.base_model import load_base
from trainer.methods.plan import base_bits
from trainer.results.card import make_card
from trainer.results.merge import MergeReport, merge
from trainer.results.save import save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["Qwen2"].write(tmp_path_factory.mktemp("base") / "qwen2-tiny")


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    config = config_of(base, options)
    torch.manual_seed(0)
    model = apply_method(load_base(base, dtype=torch.float32, bits=base_bits(config)), config)
    train_steps(model, 0.02, count=2)
    run = {"config": {"finetuning_type": config.finetuning_type, "quantization_bit": config.quantization_bit}}
    save_adapter(model, base.name, folder, card=lambda found: make_card(found, base, base.name, run))
    return folder


def merged(tmp_path: Path, base: Path, adapter: Path) -> MergeReport:
    return merge(adapter, tmp_path / "merged", Home(tmp_path / "home"), base=str(base))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True, "lora_init": "pissa"}, {"finetuning_type": "ia3"}],
    ids=["lora", "dora", "pissa", "ia3"],
)
def test_the_merged_model_is_base_and_adapter_in_one_folder(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **options)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    report = merged(tmp_path, base, adapter)
    assert report.exact_gap < 1e-4 and report.cast_gap < 1e-4 and report.same_tokens == 1.0
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    check_model_folder(report.output)
    assert (report.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    both = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), str(adapter))
    assert loss_of(load_base(report.output, dtype=torch.float32)) == pytest.approx(loss_of(both), abs=1e-4)
    assert loss_of(both) < loss_of(load_base(base, dtype=torch.float32)) - 0.1


def test_it_is_merged_in_float32_and_then_cast(base: Path, tmp_path: Path) -> None:
    half = shutil.copytree(base, tmp_path / "half")
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    adapter = write_adapter(tmp_path / "adapter", half)
    report = merged(tmp_path, half, adapter)
    assert (report.dtype, report.exact_gap < 1e-4, report.cast_gap > 1e-3) == ("bfloat16", True, True)
    both = PeftModel.from_pretrained(load_base(half, dtype=torch.float32), str(adapter)).merge_and_unload()
    expected = both.model.layers[1].mlp.up_proj.weight.detach().bfloat16()
    assert torch.equal(load_file(report.output / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], expected)


def test_a_qlora_merge_says_which_base_it_used(base: Path, tmp_path: Path) -> None:
    report = merged(tmp_path, base, write_adapter(tmp_path / "adapter", base, finetuning_type="qlora"))
    assert report.notes == (
        f"the adapter was trained on a 4-bit copy of qwen2-tiny; it is merged into qwen2-tiny itself, in 16 or 32 bits "
        f"({base}), whose weights differ from that copy by its rounding",
    )
    assert report.notes[0] in str(report) and report.exact_gap < 1e-4


@pytest.mark.parametrize("method", ["ptuning_v2", "p_tuning", "prompt"])
def test_virtual_tokens_cannot_be_merged(base: Path, tmp_path: Path, method: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, finetuning_type=method)
    with pytest.raises(ConfigError, match=r"a P\w+ adapter is virtual tokens.* serve it with the hf engine"):
        merged(tmp_path, base, adapter)
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    other = FAMILIES["Llama"].write(tmp_path / "llama")
    with pytest.raises(NotServable, match=r"llama: its weights are not those .* name the right base with --base"):
        merged(tmp_path, other, adapter)
    (adapter / "adapter_card.json").unlink()
    wider = FAMILIES["GPT-2"].write(tmp_path / "gpt2")
    with pytest.raises(NotServable, match="it belongs to another base: name that one with --base"):
        merged(tmp_path, wider, adapter)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def drop_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def cut_short(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_config(**changes: Any) -> Any:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_weights, r"no adapter_model.safetensors, so this is not a trained adapter"),
        (cut_short, "truncated or damaged"),
        (change_config(peft_type="NONESUCH"), "peft_type='NONESUCH' is no method of peft"),
        (change_config(peft_type=None), "has no peft_type"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_spoilt_adapter_is_named_in_one_line(base: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    spoil(adapter)
    with pytest.raises((ConfigError, RegistryError), match=words) as caught:
        merged(tmp_path, base, adapter)
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_half_of_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 14 of its weights"):
        merged(tmp_path, base, adapter)


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        merged(tmp_path, base, write_adapter(tmp_path / "adapter", base))


def test_the_command_says_what_it_did_or_why_not(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = write_adapter(tmp_path / "lora", base)
    prompt = write_adapter(tmp_path / "prompt", base, finetuning_type="prompt")
    other = FAMILIES["Llama"].write(tmp_path / "llama")

    def command(adapter: Path, output: str, at: Path) -> int:
        words = ["merge", str(adapter), str(tmp_path / output), "--base", str(at), "--home", str(tmp_path / "home")]
        return main(words)

    assert command(lora, "merged", base) == 0
    assert "same most likely token at 100.0% of places" in capsys.readouterr().out
    assert (command(prompt, "no", base), command(lora, "no", other), command(tmp_path, "no", base)) == (2, 8, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "no").exists()
