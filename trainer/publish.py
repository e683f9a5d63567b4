"""A run's adapter, or any PEFT adapter folder, into the registry with a card that says what it belongs to."""

from pathlib import Path

from server.store.home import Home
from server.store.registry import AdapterEntry, Registry
from trainer.results.adapter_folder import find_adapter
from trainer.results.card import make_card


def publish(folder: Path, name: str, home: Home, *, base: str | None = None) -> AdapterEntry:
    """Publish a run folder (its `adapter`) or an adapter folder under `name`.

    `base` is the base model's folder or hub id; by default the one that the run or adapter_config.json names. Raises
    ConfigError or RegistryError, saying what is missing, and NotServable for another base, tokenizer or
    template than the run's.
    """
    found = find_adapter(folder, home, base)
    card = make_card(found.config, found.base, found.base_name, found.record, home.hash_cache)
    return Registry(home.adapters).publish(found.folder, name, card)
