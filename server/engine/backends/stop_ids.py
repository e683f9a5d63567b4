"""Which token ids end a text of a model, from its folder's JSON files."""

from pathlib import Path
from typing import Any

from server.store.model_folder import read_json_object


def read_stop_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids from `generation_config.json` first, then `config.json`, each once. Raises ConfigError."""
    generation_path = folder / "generation_config.json"
    sources = [read_json_object(generation_path)] if generation_path.is_file() else []
    ids: dict[int, None] = {}
    for source in [*sources, config]:
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and token_id >= 0:
                ids[token_id] = None
    return tuple(ids)
