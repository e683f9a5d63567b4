"""What the base's config.json says about rows: how long they may be, and what pads and ends them."""

from pathlib import Path

from server.errors import ConfigError
from server.store.model_folder import read_model_config
from trainer.config import TrainConfig
from trainer.examples.truncate import Limits


def pad_id(base: Path) -> int:
    """The id that pads batches and ends texts: `pad_token_id`, else the (first) end-of-text id."""
    config = read_model_config(base)
    for key in ("pad_token_id", "eos_token_id"):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    raise ConfigError(f"{base / 'config.json'}: has neither pad_token_id nor eos_token_id; set one of them")


def limits_of(config: TrainConfig, base: Path) -> Limits:
    """No longer than the model has positions."""
    positions = read_model_config(base).get("max_position_embeddings")
    most = min(config.max_length, positions) if isinstance(positions, int) else config.max_length
    return Limits(most, config.max_source_length, config.max_target_length)
