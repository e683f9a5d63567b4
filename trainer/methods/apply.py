"""What is trained: the whole model, its last layers, or an adapter made by PEFT.

Takes a loaded model that `trainer.methods.faults` has nothing against. Knows nothing about data, loss or the loop.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from trainer.errors import first_line
from trainer.methods.layer_names import ALL_LINEAR, NAMES, resolve_targets
from trainer.methods.plan import changes_base, task_type
from trainer.options.checks import PREFIX_METHODS

if TYPE_CHECKING:
    from trainer.config import TrainConfig

ADAPTER = "default"  # PEFT's name of the one adapter of a run
CONV1D_FAMILIES = ("gpt2",)


@dataclass(frozen=True)
class Size:
    """Parameters: those that are trained, and those of the base model."""

    num_trained: int
    num_base: int

    def __str__(self) -> str:
        share = 100 * self.num_trained / max(1, self.num_base)
        return f"{self.num_trained:,} trained of {self.num_base:,} parameters ({share:.2f}%)"


def apply_method(model: Any, config: "TrainConfig") -> Any:
    """The model with exactly those parameters trainable that the method trains; adapters are PEFT models.

    Raises ConfigError where PEFT or the model's architecture refuses.
    """
    method = config.finetuning_type
    if method == "full":
        return model
    if method == "freeze":
        return _train_last_layers(model, config.freeze_trainable_layers)
    adapted = _wrap(model, _peft_config(config, model), method)
    if model.config.model_type in CONV1D_FAMILIES and hasattr(adapted.peft_config[ADAPTER], "fan_in_fan_out"):
        # Quantized matrices lie the usual way round; those of the base that the adapter is served with do not.
        adapted.peft_config[ADAPTER].fan_in_fan_out = True
    if changes_base(config):
        # What `save` needs to write a plain LoRA; it lives as long as the model.
        adapted.first_lora = {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in adapted.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
    return adapted


def describe(model: Any) -> Size:
    """Counts parameters, those of nf4 weights as the numbers they stand for; the adapter's are not the base's."""
    num_trained = num_all = 0
    for weight in model.parameters():
        count = weight.numel() * (2 if type(weight).__name__ == "Params4bit" else 1)
        num_all += count
        num_trained += count if weight.requires_grad else 0
    is_adapter = hasattr(model, "peft_config")
    return Size(num_trained, num_all - num_trained if is_adapter else num_all)


def _peft_config(config: "TrainConfig", model: Any) -> Any:
    """PEFT's own settings of the method, for this model."""
    import peft

    shared: dict[str, Any] = {"task_type": task_type(config)}
    method, kind = config.finetuning_type, model.config.model_type
    if method in ("lora", "qlora"):
        return peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=_lora_init(config.lora_init),  # type: ignore[arg-type]
            target_modules=_checked_targets(resolve_targets(config.lora_target, kind), model),
            fan_in_fan_out=_has_conv1d(model),
            **shared,
        )
    if method in PREFIX_METHODS:
        return peft.PrefixTuningConfig(num_virtual_tokens=config.pre_seq_len, **shared)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(num_virtual_tokens=config.pre_seq_len, **shared)
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=config.pre_seq_len, **shared)
    if method == "ia3":
        inputs = NAMES[kind].scaled_inputs
        targets = [*NAMES[kind].scaled_outputs, *inputs]
        return peft.IA3Config(
            target_modules=targets, feedforward_modules=list(inputs), fan_in_fan_out=_has_conv1d(model), **shared
        )
    options = {**config.peft_config, "peft_type": str(config.peft_config["peft_type"]).upper()}
    return peft.get_peft_config({**shared, **options})


def _lora_init(name: str) -> bool | str:
    return name if name not in ("", "default") else True


def _has_conv1d(model: Any) -> bool:
    """GPT-2's matrices lie the other way round, which PEFT wants to be told."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _linear_names(model: Any) -> set[str]:
    """Dotted names of what LoRA can act on; bitsandbytes' modules are nn.Linear, too."""
    from torch import nn

    return {
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
    }


def _checked_targets(targets: str | list[str], model: Any) -> str | list[str]:
    """PEFT is content when one of several names exists; here each must."""
    if isinstance(targets, str):
        return targets
    every = _linear_names(model)
    missing = [name for name in targets if not any(full == name or full.endswith(f".{name}") for full in every)]
    if missing:
        ends = sorted({full.rpartition(".")[2] for full in every})
        raise ConfigError(
            f"lora_target: this {model.config.model_type} model has no layer {', '.join(missing)}; it has "
            f"{', '.join(ends)}, or take {ALL_LINEAR}"
        )
    return targets


def _wrap(model: Any, peft_config: Any, method: str) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"finetuning_type={method}: peft refuses it for this {model.config.model_type} model: {first_line(error)}"
        ) from error


def _train_last_layers(model: Any, count: int) -> Any:
    """Freeze everything but the last `count` layers; embeddings, last norm and head stay as they are."""
    layers = decoder_layers(model)
    model.requires_grad_(False)
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    return model


def decoder_layers(model: Any) -> Any:
    """The ModuleList of the model's layers, whatever its family calls it. Raises ConfigError where there is none."""
    from torch import nn

    config = model.config
    wanted = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)  # the latter: ChatGLM
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ConfigError(
        f"finetuning_type=freeze: no list of {wanted or 'its'} layers in this {config.model_type} model; "
        "take full or lora"
    )
