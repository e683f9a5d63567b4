"""`adapter_card.json`: what an adapter was trained on and with. Written by the trainer, checked by the server."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from server.store.hashes import write_json
from server.store.model_folder import read_json_object

CARD_NAME = "adapter_card.json"
CARD_FORMAT = 1
PASSED, REFUSED, FORCED = "passed", "refused", "forced"  # what the gate decided of a revision


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """One revision's facts. `name`, `revision` and `created` are filled in by `Registry.publish`."""

    base_model: str  # the base's id as trained: a hub id or its folder's name
    base_weights_hash: str  # server.store.hashes.weights_hash of the base
    tokenizer_hash: str
    chat_template_hash: str
    default_system_prompt_hash: str
    stop_token_ids: tuple[int, ...]
    method: str  # PEFT's peft_type, in lower case: lora, ia3, prefix_tuning ...
    rank: int  # 0 where the method has none
    quantization_bit: int = 0  # bits of the frozen base in training; 0: it was not quantized
    dataset_hash: str = ""
    run_id: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    backends: tuple[str, ...] = ("hf",)  # which engine backends can serve it
    report_hash: str = ""  # sha256 of the report.json that `scores` come from
    gate: str = ""  # PASSED, REFUSED or FORCED; "" where no gate was asked
    gate_reason: str = ""  # what refused, and why it was forced all the same
    name: str = ""
    revision: str = ""
    created: int = 0  # unix seconds
    format_version: int = CARD_FORMAT


class CardRefused(ValueError):
    """An adapter card that cannot be used; the text names the file and the field."""


def write_card(folder: Path, card: AdapterCard) -> None:
    write_json(folder / CARD_NAME, asdict(card))


def read_card(folder: Path) -> AdapterCard:
    """Read and check a revision's card. Raises CardRefused, or ConfigError when the file is not a JSON object."""
    path = folder / CARD_NAME
    value = read_json_object(path)
    if value.get("format_version") != CARD_FORMAT:
        raise CardRefused(f"{path}: format_version {value.get('format_version')!r}, this version reads {CARD_FORMAT}")
    try:
        return msgspec.convert(value, AdapterCard)
    except msgspec.ValidationError as error:
        raise CardRefused(f"{path}: {error}") from None
