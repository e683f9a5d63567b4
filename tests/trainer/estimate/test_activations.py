"""What a layer keeps: the formula beside what autograd saves, byte by byte."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.trainer.estimate.shapes import small
from trainer.estimate.activations import Numbers, Pass, cast_weights, saved_by_layer
from trainer.estimate.shape import shape_of
from trainer.estimate.trained import Trained

ROWS, WIDTH, RANK = 2, 32, 8
CASES = [
    ("full", torch.float32, False, 0.0),
    ("full", torch.float32, True, 0.0),
    ("lora", torch.float32, False, 0.05),
    ("lora", torch.float32, False, 0.0),
    ("lora", torch.float32, True, 0.05),
    ("lora", torch.bfloat16, True, 0.05),
    ("lora", torch.bfloat16, True, 0.0),
    ("inputs", torch.float32, False, 0.0),
    ("inputs", torch.bfloat16, True, 0.0),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("method", "dtype", "mixed", "dropout"), CASES)
def test_a_layer_keeps_what_autograd_saves(
    method: str, dtype: torch.dtype, mixed: bool, dropout: float, packed: bool
) -> None:
    saved = [_saved(layers, method, dtype, mixed, dropout, packed) for layers in (2, 3)]
    shape = shape_of({**small("qwen2"), "num_hidden_layers": 1})
    assert shape
    numbers = Numbers(dtype.itemsize, 2 if mixed else 4, mixed)
    trained = {
        "full": Trained(shape.num_parameters, 1, trains_head=True, trains_base=True),
        "lora": Trained(0, 1, trains_head=False, lora=shape.linears, rank=RANK),
        "inputs": Trained(0, 1, trains_head=False),
    }[method]
    estimated = saved_by_layer(shape, trained, Pass(ROWS, WIDTH, packed), numbers, dropout=dropout > 0)
    assert saved[1] - saved[0] == estimated + cast_weights(shape, trained, numbers)


def _saved(layers: int, method: str, dtype: torch.dtype, mixed: bool, dropout: float, packed: bool) -> int:
    """Bytes of all storages, but the weights', that a forward pass of the decoder leaves for the backward pass."""
    model = _model(layers, method, dtype, dropout)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(**_batch(packed))
    return sum(found.values())


def _model(layers: int, method: str, dtype: torch.dtype, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    values = {name: value for name, value in small("qwen2").items() if name != "model_type"}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**{**values, "num_hidden_layers": layers})).to(dtype)
    if method == "lora":
        config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config).train().base_model.model.model
    if method == "inputs":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    return model.train().model


def _batch(packed: bool) -> dict[str, Any]:
    ids = torch.randint(0, 320, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    if not packed:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    positions = torch.arange(WIDTH).remainder(WIDTH // 2).expand(ROWS, WIDTH).contiguous()
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}
