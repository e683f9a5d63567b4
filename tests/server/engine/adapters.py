"""Publishes adapters that only the fake backend would serve."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.store.card import AdapterCard
from server.store.registry import AdapterEntry, Registry

_CARD = AdapterCard(
    base_model="tiny",
    base_weights_hash="fake",
    tokenizer_hash="",
    chat_template_hash="",
    default_system_prompt_hash="",
    stop_token_ids=(),
    method="lora",
    rank=4,
)


def publish(
    registry: Registry, folder: Path, name: str, seed: int = 0, base_hash: str = "fake", **facts: Any
) -> AdapterEntry:
    """A whole, if tiny, PEFT folder; another seed is another revision. The fake backend's weights hash is "fake"."""
    return registry.publish(write_folder(folder, seed), name, replace(_CARD, base_weights_hash=base_hash, **facts))


def write_folder(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Not published yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    header = json.dumps({"lora_A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + struct.pack("<f", seed)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder
