"""A folder that somebody names by path -> a revision in the registry: only from allowed roots, never by a link out.

Knows files; whether an engine can serve what was imported is the engine's to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError
from server.store.card import CARD_NAME, AdapterCard, CardRefused, read_card
from server.store.hashes import REVISION_FILES
from server.store.model_folder import read_json_object
from server.store.registry import CONFIG_NAME, AdapterEntry, Registry, RegistryError, check_adapter_folder
from server.store.servability import largest_rank, servable


class PathRefused(RegistryError):
    """A path that may not be read."""


@dataclass(frozen=True)
class Imported:
    entry: AdapterEntry
    is_new: bool  # False: the same content had been published under this name before


def import_adapter(
    registry: Registry, path: Path, name: str, roots: Sequence[Path], base_name: str, base_weights_hash: str
) -> Imported:
    """Copy the folder in as a revision of `name`, which goes on meaning what it meant.

    A folder without a card is taken to belong to the given base model. Raises RegistryError.
    """
    folder = _allowed(path, roots)
    check_adapter_folder(folder)
    card = _card(folder, base_name, base_weights_hash)
    before = registry.revisions(name)
    entry = registry.publish(folder, name, card, make_current=False)
    return Imported(entry, entry.revision not in before)


def _allowed(path: Path, roots: Sequence[Path]) -> Path:
    """The folder, links resolved. What lies outside is refused before anything is said about whether it is there."""
    if not roots:
        raise PathRefused("adapters are imported by path only from folders that QLOOP_ADAPTER_ROOTS names; it is unset")
    if not path.is_absolute():
        raise PathRefused(f"{path} is not an absolute path")
    try:
        folder = path.resolve()
        files = [(folder / file).resolve() for file in (*REVISION_FILES, CARD_NAME)]
    except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte
        raise PathRefused(f"{str(path)!r} is no usable path") from None
    for place in (folder, *files):
        if not any(place.is_relative_to(root.resolve()) for root in roots):
            raise PathRefused(f"{path} is not inside QLOOP_ADAPTER_ROOTS, or a link in it leads out of there")
    return folder


def _card(folder: Path, base_name: str, base_weights_hash: str) -> AdapterCard:
    try:
        if (folder / CARD_NAME).is_file():
            return read_card(folder)
        config = read_json_object(folder / CONFIG_NAME)
    except (CardRefused, ConfigError) as error:
        raise RegistryError(str(error)) from None
    return AdapterCard(
        base_model=str(config.get("base_model_name_or_path") or base_name),
        base_weights_hash=base_weights_hash,
        tokenizer_hash="",
        chat_template_hash="",
        default_system_prompt_hash="",
        stop_token_ids=(),
        method=str(config["peft_type"]).lower(),
        rank=largest_rank(config),
        backends=servable(config).backends,
    )
