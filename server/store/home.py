"""The home folder's layout. Knows paths only; creates a folder when its owner asks for it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """`$QLOOP_HOME`: models, adapters, training runs, sockets and pid files, caches."""

    path: Path

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    def adapter_state(self, weights_hash: str) -> Path:
        """What an engine of that base model must know after a restart and the registry does not say."""
        return self.path / "engine" / f"adapters-{weights_hash[:12]}.json"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def run_dir(self) -> Path:
        """Sockets and pid files of running processes."""
        return self.path / "run"

    @property
    def cache(self) -> Path:
        """Anything here can be deleted at any time; it is made again."""
        return self.path / "cache"

    @property
    def hash_cache(self) -> Path:
        return self.cache / "hashes.json"

    def create(self) -> "Home":
        """Make every folder that is missing."""
        for folder in (self.models, self.adapters, self.runs, self.run_dir, self.cache):
            folder.mkdir(parents=True, exist_ok=True)
        return self
