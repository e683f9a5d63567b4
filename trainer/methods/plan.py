"""What a configuration asks of a method, in the words of PEFT. Knows no model and imports nothing heavy."""

from typing import TYPE_CHECKING, Any

from server.store.servability import BASE_CHANGING_INITS
from trainer.options.checks import PREFIX_METHODS

if TYPE_CHECKING:
    from trainer.config import TrainConfig

_PEFT_TYPES = {
    **dict.fromkeys(PREFIX_METHODS, "PREFIX_TUNING"),
    "p_tuning": "P_TUNING",
    "prompt": "PROMPT_TUNING",
    "ia3": "IA3",
}


def base_bits(config: "TrainConfig") -> int:
    """4 or 8 where the frozen base is loaded quantized, else 0; qlora means 4 unless it says 8."""
    return config.quantization_bit or (4 if config.finetuning_type == "qlora" else 0)


def task_type(config: "TrainConfig") -> str:
    return "SEQ_CLS" if config.stage == "rm" else "CAUSAL_LM"


def planned_config(config: "TrainConfig") -> dict[str, Any]:
    """What decides servability of the `adapter_config.json` that this run will leave."""
    method = config.finetuning_type
    if method in ("lora", "qlora"):
        # PiSSA and its like are saved as the difference from their beginning, a plain LoRA of twice the rank.
        factor = 2 if changes_base(config) else 1
        return {"peft_type": "LORA", "r": factor * config.lora_rank, "use_dora": config.use_dora}
    if method == "peft":
        return dict(config.peft_config)
    return {"peft_type": _PEFT_TYPES[method]}


def changes_base(config: "TrainConfig") -> bool:
    """True for beginnings that take the adapter's first value out of the base's weights."""
    return config.finetuning_type in ("lora", "qlora") and config.lora_init.startswith(BASE_CHANGING_INITS)
