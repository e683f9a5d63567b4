"""Writes small safetensors files by hand, whole or broken, without any library."""

import json
from pathlib import Path
from typing import Any


def write_safetensors(path: Path, data: bytes = b"\0" * 16, header: dict[str, Any] | None = None) -> Path:
    if header is None:
        header = {"weight": {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [0, len(data)]}}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def write_adapter(folder: Path, data: bytes = b"\0" * 16, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    write_safetensors(folder / "adapter_model.safetensors", data)
    return folder


def write_model(folder: Path, data: bytes = b"\0" * 16, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", data)
    return folder
