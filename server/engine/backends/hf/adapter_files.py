"""An adapter folder in PEFT's format -> checked tensors, without importing peft.

Every way in which serving it would differ from what was trained is an AdapterError that names the fault and the cure.
The formats are those of PEFT's save_pretrained. Knows nothing about batches or about what is loaded.
"""

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_targets import adapted_modules
from server.engine.backends.hf.kv_store import kv_shape
from server.engine.backends.hf.lora import LoraMatrices
from server.engine.backends.hf.projection import Ia3Vector

LORA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
IA3_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.ia3_l")
PROMPT_KEY = "prompt_embeddings"
MERGE = "merge it into the base model (peft's merge_and_unload)"
RETRAIN = "train it without that option"
REFUSED_OPTIONS: dict[str, str] = {
    "use_dora": MERGE,
    "use_qalora": RETRAIN,
    "use_bdlora": MERGE,
    "modules_to_save": f"{MERGE}, or train it without modules_to_save",
    "lora_bias": "train it with lora_bias=False",
    "trainable_token_indices": MERGE,
    "target_parameters": MERGE,
    "layer_replication": RETRAIN,
    "alora_invocation_tokens": RETRAIN,
    "arrow_config": RETRAIN,
    "kasa_config": MERGE,
    "monteclora_config": MERGE,
}
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these inits subtract the adapter from the base


@dataclass(frozen=True)
class ModelShape:
    """What an adapter must fit. `modules` gives (inputs, outputs) of every linear map by its dotted name."""

    modules: Mapping[str, tuple[int, int]]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int  # of an input embedding
    dtype: torch.dtype
    device: torch.device
    max_len: int


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter, ready to attach; one method only, so all but one of the fields are empty.

    `cells` is `[layers, 2, num_virtual, kv_heads, head_dim]` (keys, then values), `embeddings` `[num_virtual, hidden]`.
    """

    lora: dict[str, LoraMatrices] = field(default_factory=dict)
    ia3: dict[str, Ia3Vector] = field(default_factory=dict)
    cells: Tensor | None = None
    embeddings: Tensor | None = None

    @property
    def num_virtual(self) -> int:
        """Positions that the adapter takes before the first token."""
        if self.cells is not None:
            return self.cells.shape[2]
        return 0 if self.embeddings is None else self.embeddings.shape[0]


def with_cells(weights: AdapterWeights, cells: Tensor) -> AdapterWeights:
    """The adapter with its embeddings computed into cells `[layers, 2, num_virtual, kv_heads, head_dim]`."""
    return replace(weights, cells=cells, embeddings=None)


@dataclass(frozen=True)
class Folder:
    """An adapter folder that has been opened, and the model that it must fit."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shape: ModelShape

    def error(self, fault_and_cure: str) -> AdapterError:
        return AdapterError(f"{self.path}: {fault_and_cure}")

    def to_model(self, name: str, tensor: Tensor) -> Tensor:
        """In the model's dtype and on its device, where it must be finite."""
        moved = tensor.to(self.shape.device, self.shape.dtype)
        if not moved.isfinite().all():
            raise self.error(f"{name} holds NaN or infinity. The training run failed; train again.")
        return moved


def model_shape(model: PreTrainedModel, max_len: int) -> ModelShape:
    """The shape of a model whose linear maps have not been replaced or fused yet.

    bitsandbytes' 4-bit and 8-bit modules are nn.Linear, too, but only their `*_features` tell the size; adapters then
    have the dtype of what runs through the model.
    """
    modules: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            modules[name] = (module.nx, module.nf)
    cells = kv_shape(model)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    return ModelShape(
        modules=modules,
        num_layers=cells.num_layers,
        num_kv_heads=cells.num_kv_heads,
        head_dim=cells.head_dim,
        hidden_size=embeddings.embedding_dim,
        dtype=cells.dtype,
        device=cells.device,
        max_len=max_len,
    )


def read_adapter(path: Path, shape: ModelShape) -> AdapterWeights:
    """The adapter in `path`, in the model's dtype and on its device. Raises AdapterError."""
    config = _read_config(path)
    read = _READERS[config["peft_type"]]
    weights = read(Folder(path, config, _read_tensors(path), shape))
    if weights.num_virtual >= shape.max_len:
        raise AdapterError(
            f"{path}: its {weights.num_virtual} virtual tokens leave no room in the context of {shape.max_len} tokens. "
            "Train it with fewer, or raise QLOOP_MAX_MODEL_LEN if the model allows more."
        )
    if _changes_nothing(weights):
        raise AdapterError(f"{path} changes nothing: it is as it was before training. Train it, and save it again.")
    return weights


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{folder} has no adapter_config.json. Name the folder that training wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}). Copy the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a JSON object. Copy the adapter again.")
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in _READERS:
        raise AdapterError(
            f"{path}: peft_type is {method!r}, which is not served; {MERGE} or train one of {', '.join(_READERS)}."
        )
    for option, cure in REFUSED_OPTIONS.items():
        if config.get(option):
            raise AdapterError(f"{path}: {option}={config[option]!r} cannot be served; {cure}.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={config['bias']!r} cannot be served; train it with bias='none'.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        hint = " Save it as safetensors; pickled .bin files are never read." if list(folder.glob("*.bin")) else ""
        raise AdapterError(f"{folder} has no adapter_model.safetensors.{hint} Name the folder that training wrote.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is cut short or damaged ({error}). Copy the adapter again.") from error


def _read_lora(folder: Folder) -> AdapterWeights:
    if str(init := folder.config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_STARTS):
        raise folder.error(
            f"init_lora_weights={init!r} changed the base weights in training. Save it as a plain LoRA "
            "(peft's path_initial_model_for_weight_conversion), or merge it into the base model."
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, match in _matches(folder, LORA_KEY, "a LoRA weight of a linear layer"):
        pairs.setdefault(match["module"], {})[match["side"]] = folder.tensors[key]
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise folder.error(f"{name} has only lora_{next(iter(pair))}. Copy the adapter again.")
    lora = {name: _lora_matrices(folder, name, pair["A"], pair["B"]) for name, pair in pairs.items()}
    _check_whole(folder, lora)
    return AdapterWeights(lora=lora)


def _lora_matrices(folder: Folder, name: str, a: Tensor, b: Tensor) -> LoraMatrices:
    num_inputs, num_outputs = _sizes(folder, name)
    rank = _by_pattern(folder, "r", "rank_pattern", name)
    alpha = _by_pattern(folder, "lora_alpha", "alpha_pattern", name)
    if rank < 1 or rank != int(rank):
        raise folder.error(f"the rank of {name} is {rank:g}, not a whole number above 0. Copy the adapter again.")
    expected = [(int(rank), num_inputs), (num_outputs, int(rank))]
    if [tuple(a.shape), tuple(b.shape)] != expected:
        raise folder.error(
            f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but this model and rank {rank:g} need "
            f"{expected[0]} and {expected[1]}. The adapter belongs to another base model."
        )
    scaling = alpha / (math.sqrt(rank) if folder.config.get("use_rslora") else rank)
    return LoraMatrices(folder.to_model(name, a), folder.to_model(name, b.to(torch.float32) * scaling))


def _by_pattern(folder: Folder, option: str, patterns: str, name: str) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern: a key matches the whole name or its last dotted parts."""
    try:
        for key, value in (folder.config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", name):
                return float(value)
        return float(folder.config[option])
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise folder.error(f"r and lora_alpha must be numbers, by module in {patterns}. Copy it again.") from error


def _read_ia3(folder: Folder) -> AdapterWeights:
    matches = list(_matches(folder, IA3_KEY, "an IA3 vector of a linear layer"))
    ia3 = {m["module"]: _ia3_vector(folder, m["module"], folder.tensors[key]) for key, m in matches}
    _check_whole(folder, ia3)
    return AdapterWeights(ia3=ia3)


def _ia3_vector(folder: Folder, name: str, vector: Tensor) -> Ia3Vector:
    """PEFT saves `[1, in]` for the config's feedforward_modules and `[out, 1]` for the others."""
    num_inputs, num_outputs = _sizes(folder, name)
    if tuple(vector.shape) not in ((1, num_inputs), (num_outputs, 1)):
        raise folder.error(
            f"{name} has a vector {tuple(vector.shape)}, but this model needs {(num_outputs, 1)}, or {(1, num_inputs)} "
            "for a feed-forward module. The adapter belongs to another base model."
        )
    is_input = tuple(vector.shape) == (1, num_inputs)
    return Ia3Vector(is_input, folder.to_model(name, vector).flatten())


def _read_prefix(folder: Folder) -> AdapterWeights:
    """PEFT saves `[num_virtual, layers x (keys, values) x kv_heads x head_dim]`, its projection already applied."""
    shape = folder.shape
    cell = (shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)
    wanted = {
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_kv_heads,
        "token_dim": shape.num_kv_heads * shape.head_dim,
    }
    for option, value in wanted.items():
        if (found := folder.config.get(option)) not in (None, value):
            raise folder.error(
                f"it was trained for {option}={found!r}, but this model's keys and values have {value}. "
                "The adapter belongs to another base model."
            )
    rows = _virtual_tokens(folder, math.prod(cell))
    cells = rows.view(-1, *cell).permute(1, 2, 0, 3, 4)
    return AdapterWeights(cells=cells.clone(memory_format=torch.contiguous_format))


def _read_prompt(folder: Folder) -> AdapterWeights:
    """Prompt tuning and P-tuning: PEFT saves `[num_virtual, hidden]`, its encoder already applied."""
    return AdapterWeights(embeddings=_virtual_tokens(folder, folder.shape.hidden_size).clone())


def _virtual_tokens(folder: Folder, width: int) -> Tensor:
    if unknown := sorted(folder.tensors.keys() - {PROMPT_KEY}):
        raise folder.error(f"the tensor {unknown[0]!r} is not {PROMPT_KEY}. Train it without extra modules.")
    rows = folder.tensors.get(PROMPT_KEY)
    if rows is None or not rows.numel():
        raise folder.error(f"adapter_model.safetensors holds no {PROMPT_KEY}. Train or copy it again.")
    if folder.config.get("num_transformer_submodules") not in (None, 1):
        raise folder.error("it was trained for an encoder-decoder model. Train it for a causal language model.")
    if rows.dim() != 2 or rows.shape[1] != width:
        raise folder.error(
            f"{PROMPT_KEY} is {tuple(rows.shape)}, but this model needs {width} numbers per virtual token. "
            "The adapter belongs to another base model."
        )
    if rows.shape[0] != (num_virtual := folder.config.get("num_virtual_tokens")):
        raise folder.error(f"it holds {rows.shape[0]} virtual tokens, its config says {num_virtual}. Copy it again.")
    return folder.to_model(PROMPT_KEY, rows)


def _matches(folder: Folder, pattern: re.Pattern[str], kind: str) -> Iterable[tuple[str, re.Match[str]]]:
    """Every tensor's key, taken apart; there is at least one, and none that means something else."""
    if not folder.tensors:
        raise folder.error(f"adapter_model.safetensors holds no {folder.config['peft_type']} weights. Train it again.")
    for key in folder.tensors:
        match = pattern.fullmatch(key)
        if match is None:
            raise folder.error(f"the tensor {key!r} is not {kind}. Merge the adapter instead.")
        yield key, match


def _check_whole(folder: Folder, found: Container[str]) -> None:
    """A file can be a valid one and still have lost layers: the model would be half adapted, without any error."""
    for name in adapted_modules(folder.config, folder.shape.modules):
        if name not in found:
            raise folder.error(
                f"it has no weights for {name}, which its target_modules name. Copy it again, or train it again."
            )


def _sizes(folder: Folder, name: str) -> tuple[int, int]:
    """(inputs, outputs) of the model's linear map of that name."""
    modules = folder.shape.modules
    if name in modules:
        return modules[name]
    if any(other.startswith(f"{name}.") for other in modules):
        raise folder.error(f"{name} is not a linear layer. Merge the adapter instead.")
    raise folder.error(
        f"this model has no linear layer {name!r}. The adapter belongs to another base model, "
        "or changes another kind of layer: then merge it."
    )


def _changes_nothing(weights: AdapterWeights) -> bool:
    if weights.num_virtual:
        return False
    loras, vectors = weights.lora.values(), weights.ia3.values()
    return all(not m.a.any() or not m.b.any() for m in loras) and all(bool((v.scale == 1).all()) for v in vectors)


_READERS: dict[str, Callable[[Folder], AdapterWeights]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt,
    "P_TUNING": _read_prompt,
}
