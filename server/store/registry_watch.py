"""What is published, looked at again and again: cheap enough to do twice a second with a thousand names.

A name's folder is read again only when its modification time has changed, or is so young that it could change once
more without showing. Knows nothing about engines or about what the revisions hold.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.store.names import NameRefused, check_name, check_revision
from server.store.registry import Registry

YOUNG_S = 2.0  # coarser clocks than this are not in use


@dataclass(frozen=True)
class PublishedName:
    """One name of the registry: what it means, and all revisions there are."""

    current: str | None
    revisions: frozenset[str]


class RegistryWatch:
    """Belongs to one thread."""

    def __init__(self, adapters_dir: Path) -> None:
        self._registry = Registry(adapters_dir)
        self._seen: dict[str, tuple[int, PublishedName]] = {}

    def look(self) -> Mapping[str, PublishedName]:
        """All names as they are now."""
        seen: dict[str, tuple[int, PublishedName]] = {}
        try:
            with os.scandir(self._registry.path) as folders:
                for folder in folders:
                    if not folder.name.startswith(".") and folder.is_dir():
                        self._look_at(folder, seen)
        except OSError:
            pass  # nothing was ever published
        self._seen = seen
        return {name: published for name, (_, published) in seen.items()}

    def _look_at(self, folder: os.DirEntry[str], seen: dict[str, tuple[int, PublishedName]]) -> None:
        try:
            name = check_name(folder.name)
            changed_ns = os.stat(folder.path).st_mtime_ns
            known = self._seen.get(name)
            if known is None or known[0] != changed_ns or time.time() - changed_ns / 1e9 < YOUNG_S:
                known = (changed_ns, PublishedName(self._registry.current(name), _revisions(folder.path)))
            seen[name] = known
        except (OSError, NameRefused):
            pass  # it went while we looked, or it is no name of ours


def _revisions(folder: str) -> frozenset[str]:
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if _is_revision(entry.name) and entry.is_dir())


def _is_revision(text: str) -> bool:
    try:
        return bool(check_revision(text))
    except NameRefused:
        return False
