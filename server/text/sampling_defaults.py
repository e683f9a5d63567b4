"""How a model asks to be sampled where a request says nothing: its generation_config.json."""

import json
from pathlib import Path
from typing import Any

from server.errors import ConfigError

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Of a model folder, by name, as vLLM takes them. Raises ConfigError when the file is damaged."""
    path = folder / "generation_config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return {name: config[name] for name in NAMES if config.get(name) is not None}
