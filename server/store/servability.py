"""Which engines serve an adapter as it is, and what has to be done about one that none of them serves.

One place for publishing, for the card and for the warning before training. Looks at the values of `adapter_config.json`
only. The rules for vllm are those of vLLM 0.32's `lora/peft_helper.py` and `config/lora.py`; the rules for hf are those
of `server/engine/backends/hf/adapter_files.py`, which a test compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks, which also has 1
VLLM_DEFAULT_RANK = 16
# Architectures whose vLLM implementation takes no LoRA.
NO_LORA_IN_VLLM = frozenset({"gpt2", "bloom"})
HF_ONLY = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "IA3"})
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of LoRA that both engines refuse.
MERGED_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class Verdict:
    """`backends` serve the adapter as it is; none means: merge it first. `notes` are for the operator."""

    backends: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " and ".join(self.backends) if self.backends else "after `merge` only"


def servable(adapter_config: Mapping[str, Any], model_type: str = "") -> Verdict:
    """Who serves the adapter of this `adapter_config.json` on a base of `model_type` (may be unknown: "")."""
    method = str(adapter_config.get("peft_type", "")).upper()
    if method in HF_ONLY:
        return Verdict(("hf",), (f"{method} adapters are served by the hf engine only",))
    if method != "LORA":
        return Verdict((), (f"{method} adapters are served by no engine: merge the adapter into its base first",))
    if option := _merged_option(adapter_config):
        return Verdict((), (f"{option} is served by no engine: merge the adapter into its base first",))
    if model_type in NO_LORA_IN_VLLM:
        return Verdict(("hf",), (f"vLLM takes no LoRA for {model_type} models; the hf engine does",))
    return _by_rank(adapter_config)


def _merged_option(config: Mapping[str, Any]) -> str | None:
    """The option of a LoRA that makes merging necessary."""
    for option in MERGED_OPTIONS:
        if config.get(option):
            return f"{option}={config[option]!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    init = config.get("init_lora_weights")
    return f"init_lora_weights={init!r}" if str(init).lower().startswith(BASE_CHANGING_INITS) else None


def _by_rank(config: Mapping[str, Any]) -> Verdict:
    rank = largest_rank(config)
    if rank > VLLM_RANKS[-1]:
        return Verdict(("hf",), (f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this is {rank}; the hf engine serves it",))
    if rank > VLLM_DEFAULT_RANK:
        limit = vllm_rank_for(rank)
        note = f"for vLLM start the engine with QLOOP_MAX_ADAPTER_RANK={limit} (unset: {VLLM_DEFAULT_RANK})"
        return Verdict(("hf", "vllm"), (note,))
    return Verdict(("hf", "vllm"))


def vllm_rank_for(rank: int) -> int | None:
    """The smallest rank that vLLM can be built for and that holds this one; larger ones are slower. None: no such."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def num_virtual_tokens(config: Mapping[str, Any]) -> int:
    """Places of the context that a prompt method's virtual tokens take; 0 where the method has none."""
    value = config.get("num_virtual_tokens")
    return value if isinstance(value, int) else 0


def largest_rank(config: Mapping[str, Any]) -> int:
    """0 where the method has no rank."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)
