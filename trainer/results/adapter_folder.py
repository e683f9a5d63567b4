"""Finding an adapter and the base it belongs to, from whatever the user named. Reads JSON and headers only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.card import CARD_NAME
from server.store.home import Home
from server.store.model_folder import default_served_name, read_json_object, resolve_model
from server.store.names import NameRefused, parse_model_id
from server.store.registry import CONFIG_NAME, Registry, UnknownAdapter, check_adapter_folder
from trainer.results.card import run_bits
from trainer.runs.resume import HASHES
from trainer.runs.run_folder import read_run


@dataclass(frozen=True)
class FoundAdapter:
    """`run` is the run's record, {} for an adapter from elsewhere."""

    folder: Path
    config: dict[str, Any]
    run: dict[str, Any]
    base: Path
    base_name: str

    @property
    def record(self) -> dict[str, Any]:
        """The run's record; of an adapter from elsewhere the hashes that its card knows."""
        card = {} if self.run else self._card()
        return {**{name: card[name] for name in HASHES if card.get(name)}, **self.run}

    @property
    def trained_on(self) -> str | None:
        """Hash of the weights it was trained on, if the run or a card knows it."""
        known = self.record.get("base_weights_hash")
        return str(known) if known else None

    @property
    def bits(self) -> int:
        """Bits of the frozen base in training, if the run or a card knows it; 0 if it was not quantized."""
        return run_bits(self.run) or int(self._card().get("quantization_bit") or 0)

    def _card(self) -> dict[str, Any]:
        path = self.folder / CARD_NAME
        return read_json_object(path) if path.is_file() else {}


def named_folder(name: str, home: Home) -> tuple[Path, str | None] | None:
    """What `name` means: a folder, a run's id, or a published `name` or `name@revision` with the base its card names.

    None: none of them, so it may be a model's name. Raises ConfigError or RegistryError for a revision that is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if (home.runs / name / "run.json").is_file():
        return home.runs / name, None
    try:
        wanted = parse_model_id(name)
        entry = Registry(home.adapters).get(wanted.name, wanted.revision)
    except (NameRefused, UnknownAdapter) as error:
        if "@" in name:
            raise ConfigError(f"{name}: {error}") from None
        return None
    # A card names its base as the API does; what is not in the home is found by adapter_config.json.
    base = entry.card.base_model
    return entry.path, base if (home.models / base).is_dir() else None


def named_adapter(name: str, home: Home) -> tuple[Path, str | None]:
    """`named_folder` where a model would not do. Raises ConfigError and RegistryError."""
    found = named_folder(name, home)
    if found is None:
        raise ConfigError(
            f"{name}: is no run, no adapter folder and no published adapter; `python -m trainer runs` lists the runs"
        )
    return found


def find_adapter(folder: Path, home: Home, base: str | None = None) -> FoundAdapter:
    """`folder` is a run's folder or an adapter's; `base` a folder or hub id, by default the one that was trained on.

    Raises ConfigError or RegistryError, saying what is missing.
    """
    run: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        run = read_run(folder)
        if run.get("state") != "done":
            raise ConfigError(f"{folder}: the run is {run.get('state')}, not done; train it to the end first")
        if run.get("output") != "adapter":
            raise ConfigError(
                f"{folder}: the run trained a whole model, not an adapter; serve {folder / 'model'} itself"
            )
        folder = folder / "adapter"
    check_adapter_folder(folder)
    config = read_json_object(folder / CONFIG_NAME)
    if config.get("task_type") == "SEQ_CLS":
        raise ConfigError(
            f"{folder}: a reward model scores answers and writes none; it is for stage=ppo, as reward_model"
        )
    base = base or run.get("base_path") or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder}: does not name its base model; give it with --base")
    return FoundAdapter(folder, config, run, resolve_model(base, home), default_served_name(base))
