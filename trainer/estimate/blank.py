"""Any architecture on torch's meta device: the real modules, no weights, no memory.

Counts parameters of a model, and what a method would train in it, with the trainer's own code.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from trainer.config import TrainConfig
from trainer.errors import first_line
from trainer.estimate.shape import Linear, ModelShape, saved_bits


def blank_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's architecture on the meta device. Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{folder}: its architecture cannot be built: {first_line(error)}") from error


def blank_shape(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of an architecture that `shape_of` does not know. Parameters are exact, activations approximate."""
    from trainer.methods.apply import decoder_layers

    model = blank_model(folder, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model)
    vocabulary, hidden = _embedding(model).shape
    linears = tuple(_linears(layers[0]))
    # Of all of them: layers may differ, the first dense and the others with experts.
    num_in_layers = sum(weight.numel() for layer in layers for weight in layer.parameters())
    heads = int(getattr(model.config, "num_attention_heads", 0) or 1)
    kv_heads = int(getattr(model.config, "num_key_value_heads", None) or heads)
    head = model.get_output_embeddings()
    return ModelShape(
        model_type=str(config["model_type"]),
        vocabulary=vocabulary,
        hidden=hidden,
        layers=len(layers),
        heads=heads,
        kv_heads=kv_heads,
        head_size=int(getattr(model.config, "head_dim", None) or hidden // heads),
        feed_forward=max((max(linear.inputs, linear.outputs) for linear in linears), default=hidden),
        is_tied=head is not None and head.weight is _embedding(model),
        linears=linears,
        num_norms=0,
        num_outside=sum(weight.numel() for weight in model.parameters()) - num_in_layers,
        most_positions=int(getattr(model.config, "max_position_embeddings", 0) or 0),
        is_exact=False,
        num_in_layers=num_in_layers,
        saved_bits=saved_bits(config),
    )


def count_trained(folder: Path, config: TrainConfig) -> int:
    """Trainable parameters of any method, counted on the real modules. Raises ConfigError as training would."""
    import torch

    from trainer.methods.apply import apply_method, describe

    model = blank_model(folder, trust_remote_code=config.trust_remote_code)
    # How LoRA begins changes no count, and PiSSA's beginning is taken from weights that are not here.
    config = replace(config, lora_init="")
    with torch.device("meta"):
        return describe(apply_method(model, config)).num_trained


def _embedding(model: Any) -> Any:
    """The matrix [vocabulary, hidden]. Raises ConfigError where a model with code of its own does not say which."""
    try:
        return model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(f"this {model.config.model_type} model does not name its token embedding") from error


def _linears(layer: Any) -> list[Linear]:
    found = []
    for name, part in layer.named_modules():
        weight: Any = getattr(part, "weight", None)
        if type(part).__name__ == "Linear":
            found.append(Linear(name, weight.shape[1], weight.shape[0], part.bias is not None))
        elif type(part).__name__ == "Conv1D":  # GPT-2's, which lies the other way round
            found.append(Linear(name, weight.shape[0], weight.shape[1], True))
    return found
