"""Adapter folders: what is read right, what is refused and with which words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_files import AdapterWeights, ModelShape, model_shape, read_adapter, with_cells
from tests.server.engine.backends.families import FAMILIES, VOCAB_SIZE, load
from tests.server.engine.backends.peft_adapters import METHODS, load_adapted, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # peft corrects itself for GPT-2
CONTEXT = 256


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["Qwen3"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shape(model_folder: Path) -> ModelShape:
    return model_shape(load(model_folder), CONTEXT)


@pytest.fixture(scope="module")
def saved(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good folder of every method."""
    root = tmp_path_factory.mktemp("adapters")
    return {method: write_adapter(root / method, FAMILIES["Qwen3"], model_folder, method) for method in METHODS}


def test_shape_of_linear_and_conv1d_models(shape: ModelShape, tmp_path: Path) -> None:
    assert shape.modules["model.layers.2.self_attn.k_proj"] == (64, 64) and shape.modules["lm_head"] == (64, VOCAB_SIZE)
    assert len(shape.modules) == 3 * 7 + 1
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.hidden_size) == (3, 2, 32, 64)
    gpt2 = load(FAMILIES["GPT-2"].write(tmp_path))
    found, config = model_shape(gpt2, CONTEXT), gpt2.config
    assert found.modules["transformer.h.0.attn.c_attn"] == (config.n_embd, 3 * config.n_embd)
    assert (found.num_layers, found.num_kv_heads, found.hidden_size) == (config.n_layer, config.n_head, config.n_embd)
    assert found.head_dim == config.n_embd // config.n_head


class PackedLinear(nn.Linear):
    """As bitsandbytes' 4-bit module: two weights a byte in one long column."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)
        packed = torch.zeros(num_inputs * num_outputs // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_shape_of_quantized_modules_is_that_of_the_map(model_folder: Path, shape: ModelShape) -> None:
    model = load(model_folder)
    for name, sizes in shape.modules.items():
        if name != "lm_head":
            model.set_submodule(name, PackedLinear(*sizes))
    quantized = model_shape(model, CONTEXT)
    assert quantized.modules == shape.modules and quantized.dtype == torch.float32


@pytest.mark.parametrize("family", ["Qwen3", "GPT-2", "Bloom"])
@pytest.mark.parametrize("method", ["prefix tuning", "prefix tuning, projected"])
def test_prefix_cells_equal_what_peft_feeds(tmp_path: Path, family: str, method: str) -> None:
    model_folder = FAMILIES[family].write(tmp_path / "model")
    folder = write_adapter(tmp_path / "adapter", FAMILIES[family], model_folder, method)
    adapted = load_adapted(model_folder, folder)
    weights = read_adapter(folder, model_shape(load(model_folder), CONTEXT))
    cache = adapted.get_prompt(batch_size=1)
    expected = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    assert weights.cells is not None and weights.embeddings is None and weights.num_virtual == expected.shape[3]
    assert torch.equal(weights.cells, expected.transpose(2, 3)) and weights.cells.is_contiguous()


@pytest.mark.parametrize("method", ["P-tuning", "prompt tuning"])
def test_embeddings_equal_what_peft_feeds(
    model_folder: Path, shape: ModelShape, saved: dict[str, Path], method: str
) -> None:
    weights = read_adapter(saved[method], shape)
    expected = load_adapted(model_folder, saved[method]).get_prompt(batch_size=1)[0]
    assert weights.embeddings is not None and torch.equal(weights.embeddings, expected)
    assert weights.num_virtual == len(expected) and weights.cells is None
    cells = with_cells(weights, torch.zeros(3, 2, len(expected), 2, 32))
    assert cells.embeddings is None and cells.num_virtual == len(expected)


def test_tensors_have_the_models_dtype(shape: ModelShape, saved: dict[str, Path]) -> None:
    low = replace(shape, dtype=torch.bfloat16)
    read = {method: read_adapter(folder, low) for method, folder in saved.items()}
    lora, ia3 = read["LoRA"].lora, read["IA3"].ia3
    tensors = [t for m in lora.values() for t in (m.a, m.b)] + [v.scale for v in ia3.values()]
    tensors += [t for w in read.values() for t in (w.cells, w.embeddings) if t is not None]
    assert len(lora) == 21 and len(ia3) == 9 and {t.dtype for t in tensors} == {torch.bfloat16}
    assert {name for name, v in ia3.items() if v.is_input} == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)

    return edit


def edit_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors | {name: change(tensors[name]).contiguous()})


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
L = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
P = "prompt_embeddings"
NAN = float("nan")
LORA, IA3, PREFIX, PROMPT = "LoRA", "IA3", "prefix tuning", "P-tuning"
Fault = tuple[str, Callable[[Path], object], str]
FAULTS: dict[str, Fault] = {
    "no config": (LORA, lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "config is no JSON": (LORA, lambda folder: (folder / "adapter_config.json").write_text("{"), "as JSON"),
    "config is a list": (LORA, lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "config without rank": (LORA, edit_config(r=None), "r and lora_alpha"),
    "rank 0": (LORA, edit_config(r=0), "is 0, not a whole number"),
    "broken rank pattern": (LORA, edit_config(rank_pattern={"(": 3}), "rank_pattern"),
    "alpha pattern is a list": (LORA, edit_config(alpha_pattern=[1]), "alpha_pattern"),
    "no method": (LORA, edit_config(peft_type=None), "peft_type is None"),
    "method is a list": (LORA, edit_config(peft_type=["LORA"]), "peft_type"),
    "DoRA": (LORA, edit_config(use_dora=True), "use_dora"),
    "PiSSA": (LORA, edit_config(init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "modules_to_save": (LORA, edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (LORA, edit_config(bias="all"), "bias='all'"),
    "lora_bias": (LORA, edit_config(lora_bias=True), "lora_bias"),
    "no weights": (
        LORA,
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors",
    ),
    "pickled weights": (LORA, only_pickle, "never read"),
    "truncated": (LORA, cut_short, "cut short or damaged"),
    "empty file": (LORA, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "cut short"),
    "no tensors": (LORA, edit_tensors(lambda tensors: {}), "no LORA weights"),
    "B is missing": (LORA, edit_tensors(lambda t: {k: v for k, v in t.items() if k == A}), "only lora_A"),
    "a layer is missing": (
        LORA,
        edit_tensors(lambda t: {k: v for k, v in t.items() if "layers.2" not in k}),
        "no weights for model.layers.2.self_attn.q_proj",
    ),
    "on an embedding": (LORA, edit_tensors(lambda t: t | {"model.x.lora_embedding_A": t[A].clone()}), "embedding"),
    "unknown module": (
        LORA,
        edit_tensors(lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}),
        "no linear layer 'model.layers.9",
    ),
    "not a linear layer": (
        LORA,
        edit_tensors(lambda t: {k.replace(".q_proj", ""): v for k, v in t.items()}),
        "not a linear",
    ),
    "wrong shape": (LORA, edit_tensor(A, lambda t: t[:, :-1]), "another base model"),
    "rank differs from the config": (LORA, edit_config(r=5), "rank 5"),
    "NaN": (LORA, edit_tensor(A, lambda t: t * NAN), "NaN"),
    "scaling is no number": (LORA, edit_config(lora_alpha=NAN), "NaN"),
    "IA3: no tensors": (IA3, edit_tensors(lambda tensors: {}), "no IA3 weights"),
    "IA3: another tensor": (IA3, edit_tensors(lambda t: t | {A: t[L].clone()}), "not an IA3 vector"),
    "IA3: wrong size": (IA3, edit_tensor(L, lambda t: t[:-1]), "another base model"),
    "IA3: no vector": (IA3, edit_tensor(L, lambda t: t.flatten()), "another base model"),
    "IA3: unknown module": (
        IA3,
        edit_tensors(lambda t: {k.replace("k_proj", "key"): v for k, v in t.items()}),
        "no linear layer 'model.layers.0.self_attn.key'",
    ),
    "IA3: a layer is missing": (
        IA3,
        edit_tensors(lambda t: {k: v for k, v in t.items() if "layers.2" not in k}),
        "no weights for model.layers.2.self_attn.k_proj",
    ),
    "IA3: infinity": (IA3, edit_tensor(L, lambda t: t / 0), "infinity"),
    "IA3: modules_to_save": (IA3, edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "prefix: layers": (PREFIX, edit_config(num_layers=4), "num_layers=4"),
    "prefix: heads": (PREFIX, edit_config(num_attention_heads=1), "num_attention_heads=1"),
    "prefix: width": (PREFIX, edit_config(token_dim=32), "token_dim=32"),
    "prefix: wrong shape": (PREFIX, edit_tensor(P, lambda t: t[:, :-16]), "another base model"),
    "prefix: more dimensions": (PREFIX, edit_tensor(P, lambda t: t[None]), "another base model"),
    "prefix: encoder-decoder": (PREFIX, edit_config(num_transformer_submodules=2), "encoder-decoder"),
    "prefix: NaN": (PREFIX, edit_tensor(P, lambda t: t * NAN), "NaN"),
    "prefix: no tokens": (PREFIX, edit_tensor(P, lambda t: t[:0]), "holds no prompt_embeddings"),
    "prefix: number of tokens": (PREFIX, edit_config(num_virtual_tokens=7), "its config says 7"),
    "prompt: wrong width": (PROMPT, edit_tensor(P, lambda t: t[:, :-1]), "another base model"),
    "prompt: extra module": (PROMPT, edit_tensors(lambda t: t | {"lm_head.weight": t[P].clone()}), "'lm_head.weight'"),
    "prompt: no tensors": (PROMPT, edit_tensors(lambda tensors: {}), "holds no prompt_embeddings"),
    "prompt: infinity": (PROMPT, edit_tensor(P, lambda t: t / 0), "infinity"),
    "prompt: truncated": (PROMPT, cut_short, "cut short or damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folder_is_refused_with_its_path(
    fault: str, shape: ModelShape, saved: dict[str, Path], tmp_path: Path
) -> None:
    method, spoil, words = FAULTS[fault]
    folder = shutil.copytree(saved[method], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, shape)
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_of_another_base_is_refused(saved: dict[str, Path], tmp_path: Path, method: str) -> None:
    other = model_shape(load(FAMILIES["Bloom"].write(tmp_path)), CONTEXT)
    with pytest.raises(AdapterError, match="another base model"):
        read_adapter(saved[method], other)


@pytest.mark.parametrize("method", ["prefix tuning", "prompt tuning"])
def test_virtual_tokens_must_leave_room_in_the_context(shape: ModelShape, saved: dict[str, Path], method: str) -> None:
    num_virtual = read_adapter(saved[method], shape).num_virtual
    with pytest.raises(AdapterError, match=f"{num_virtual} virtual tokens leave no room"):
        read_adapter(saved[method], replace(shape, max_len=num_virtual))
    assert read_adapter(saved[method], replace(shape, max_len=num_virtual + 1)).num_virtual == num_virtual


@pytest.mark.parametrize(
    "config",
    [LoHaConfig(r=2, target_modules=["q_proj"]), VeraConfig(r=2, target_modules=["q_proj"])],
    ids=["LOHA", "VERA"],
)
def test_method_that_is_not_served_is_refused(
    model_folder: Path, shape: ModelShape, tmp_path: Path, config: PeftConfig
) -> None:
    get_peft_model(load(model_folder), config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=rf"'{config.peft_type.value}'.*merge_and_unload.*LORA, IA3, PREFIX_TUNING"):
        read_adapter(tmp_path, shape)


@pytest.mark.parametrize("method", ["LoRA", "IA3"])
def test_untrained_adapter_is_refused(shape: ModelShape, saved: dict[str, Path], tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(saved[method], tmp_path / "copy")
    read_adapter(folder, shape)
    edit_tensors(lambda t: {k: torch.ones_like(v) if "ia3" in k else v * ("lora_A" in k) for k, v in t.items()})(folder)
    with pytest.raises(AdapterError, match="changes nothing"):
        read_adapter(folder, shape)


def test_scaling_is_folded_into_b(model_folder: Path, shape: ModelShape, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 9},
        alpha_pattern={"^model.layers.1.self_attn.v_proj": 30},
    )
    adapted = get_peft_model(load(model_folder), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(1)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    lora = read_adapter(tmp_path, shape).lora
    scalings = {name: round(float(matrix.b[0, 0]), 6) for name, matrix in lora.items() if "layers.2" not in name}
    assert scalings == {
        "model.layers.0.self_attn.q_proj": 2.0,
        "model.layers.0.self_attn.v_proj": 3.0,
        "model.layers.1.self_attn.q_proj": 3.0,
        "model.layers.1.self_attn.v_proj": 15.0,
    }


def test_adapter_without_virtual_tokens_takes_none() -> None:
    assert AdapterWeights().num_virtual == 0
