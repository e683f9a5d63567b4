"""What cannot work: a method on a base, by the base's config.json alone, before anything is loaded.

Imports nothing heavy, but PEFT for the methods that are passed through to it.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.store.model_folder import num_positions
from server.store.servability import servable
from trainer.errors import ConfigFaults, first_line
from trainer.methods.layer_names import NAMES
from trainer.methods.plan import base_bits, changes_base, planned_config
from trainer.options.checks import PROMPT_METHODS, WHOLE_METHODS

if TYPE_CHECKING:
    from trainer.config import TrainConfig

UNTESTED = "this method of peft is passed through untested: look at the result before you rely on it"
# Those that need no data to begin with.
_LORA_INITS = re.compile(r"|default|gaussian|orthogonal|pissa|pissa_niter_\d+|olora")


def check_method(config: "TrainConfig", model_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Can the method train a base with this config.json? Returns what the user should know before the run starts.

    Raises ConfigFaults with everything that cannot work.
    """
    faults = [*_base_faults(config, model_config), *_method_faults(config, model_config)]
    if faults:
        raise ConfigFaults(faults)
    if config.finetuning_type in WHOLE_METHODS or config.stage == "rm":
        return ()
    notes = servable(planned_config(config), str(model_config.get("model_type"))).notes
    return (*notes, UNTESTED) if config.finetuning_type == "peft" else notes


def _base_faults(config: "TrainConfig", base: Mapping[str, Any]) -> list[str]:
    kind = base.get("model_type")
    architectures = " ".join(map(str, base.get("architectures") or ()))
    faults = []
    if base.get("is_encoder_decoder"):
        faults.append(
            f"the base is a {kind} model, which is sequence-to-sequence; decoder-only models are trained here"
        )
    elif "vision_config" in base or "audio_config" in base:
        faults.append(f"the base is a {kind} model, which takes images or sound; models of text alone are trained here")
    elif architectures.endswith(("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification")):
        faults.append(f"the base is a {architectures}; a causal language model (…ForCausalLM) is needed")
    quantized = base.get("quantization_config")
    if quantized:
        faults += _quantized_base_faults(config, quantized)
    return faults


def _quantized_base_faults(config: "TrainConfig", quantized: Any) -> list[str]:
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
    if config.finetuning_type in WHOLE_METHODS:
        return [
            f"finetuning_type={config.finetuning_type} cannot train quantized weights ({method}); name the 16-bit base"
        ]
    if method != "bitsandbytes":
        return [f"the base is quantized with {method}; name the 16-bit base, and quantization_bit=4 to save memory"]
    bits = 4 if quantized.get("load_in_4bit") else 8
    if config.quantization_bit not in (None, bits):
        return [f"quantization_bit={config.quantization_bit}, but the base is saved in {bits} bits; leave it unset"]
    return []


def _method_faults(config: "TrainConfig", base: Mapping[str, Any]) -> list[str]:
    method, kind = config.finetuning_type, base.get("model_type")
    faults = []
    num_layers = base.get("num_hidden_layers", base.get("n_layer"))
    if method == "freeze" and isinstance(num_layers, int) and config.freeze_trainable_layers > num_layers:
        faults.append(f"freeze_trainable_layers={config.freeze_trainable_layers}, but the base has {num_layers} layers")
    if method == "ia3" and kind not in NAMES:
        faults.append(
            f"ia3: which layers of a {kind} model it scales is not known; name them: finetuning_type=peft and "
            'peft_config={"peft_type": "IA3", "target_modules": [...], "feedforward_modules": [...]}'
        )
    if method in PROMPT_METHODS:
        positions = num_positions(base)
        if positions is not None and config.pre_seq_len >= positions:
            faults.append(f"pre_seq_len={config.pre_seq_len} leaves no room in the base's {positions} positions")
    narrow = base.get("word_embed_proj_dim", base.get("hidden_size")) != base.get("hidden_size")
    if method in ("p_tuning", "prompt") and narrow:
        faults.append(
            f"{method}: peft cannot do it for a base whose embeddings are narrower than its layers; take prefix"
        )
    if base.get("tie_word_embeddings") and {"lm_head", "embed_out"} & set(config.lora_target):
        faults.append(
            "lora_target names the head, which shares its weights with the embedding in this base; leave it out"
        )
    if method in ("lora", "qlora"):
        faults += _lora_init_faults(config, base)
    if method == "peft" and (fault := _passed_through_fault(config.peft_config)):
        faults.append(fault)
    return faults


def _lora_init_faults(config: "TrainConfig", base: Mapping[str, Any]) -> list[str]:
    if not _LORA_INITS.fullmatch(config.lora_init):
        return [
            f"lora_init={config.lora_init!r}: accepted are default, gaussian, orthogonal, pissa, pissa_niter_16, olora"
        ]
    if changes_base(config) and (base_bits(config) or base.get("quantization_config")):
        return [
            f"lora_init={config.lora_init} changes the base's weights, which quantized ones do not allow; leave it out"
        ]
    return []


def _passed_through_fault(options: Mapping[str, Any]) -> str | None:
    """What PEFT says about the options. Imports it: seconds, for the one method that needs them."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name = str(options.get("peft_type", "")).upper()
    known = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    if name not in known:
        return f"peft_config: peft_type={options.get('peft_type')!r} is no method of peft; it has {', '.join(known)}"
    try:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**{**options, "peft_type": name})
    except (TypeError, ValueError) as error:
        return f"peft_config: {first_line(error)}"
    return None
