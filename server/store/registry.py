"""The adapter registry: `<adapters>/<name>/<revision>/`, the one-line file `<name>/current`, and `<name>/history`.

A revision is named by its content hash, immutable and never overwritten. Writers (API and command line alike) take
one file lock, write aside in the same file system and rename. Knows nothing about engines: loading is theirs.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.card import FORCED, PASSED, REFUSED, AdapterCard, CardRefused, read_card, write_card
from server.store.hashes import REVISION_FILES, folder_hash, write_text
from server.store.model_folder import read_json_object
from server.store.names import NameRefused, check_name, check_revision
from server.store.safetensors_check import BrokenFile, read_header

CONFIG_NAME, WEIGHTS_NAME = REVISION_FILES
CURRENT = "current"
HISTORY = "history"  # what `current` was before, oldest first: one revision a line
MAX_HISTORY = 100
_ASIDE = ".aside-"


class RegistryError(Exception):
    """An adapter that cannot be published, found or removed; the text says why and what to do."""


class UnknownAdapter(RegistryError):
    """There is no such name, or no such revision of it."""


class NotProved(RegistryError):
    """The gate refused this revision when it was published."""


class Moved(RegistryError):
    """Somebody else moved the name between the look and the change."""


@dataclass(frozen=True)
class AdapterEntry:
    """One published revision."""

    name: str
    revision: str
    path: Path
    card: AdapterCard
    is_current: bool

    @property
    def id(self) -> str:
        return f"{self.name}@{self.revision}"


class Registry:
    """Owns the adapters folder. Safe for several processes: readers never see a half-written revision."""

    def __init__(self, adapters_dir: Path) -> None:
        self.path = adapters_dir

    def publish(self, folder: Path, name: str, card: AdapterCard, *, make_current: bool = True) -> AdapterEntry:
        """Copy a PEFT adapter folder in as a revision of `name`, and point `name` at it unless told otherwise.

        The same content again changes nothing but `current`, and mends files that were changed in place. With a card
        for another base it is refused, or, where the earlier card was never used, takes its place. Raises
        RegistryError, also for an unusable name or folder.
        """
        name = _checked(name)
        check_adapter_folder(folder)
        with self._lock():
            self._remove_torn()
            aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.path))
            try:
                revision = self._fill(aside, folder, name, card)
                target = self.path / name / revision
                if target.is_dir():
                    self._mend(target, aside)
                    self._publish_again(self.get(name, revision), card)
                else:
                    target.parent.mkdir(exist_ok=True)
                    os.replace(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            if make_current:
                self._point(name, revision, self._history(name))
        return self.get(name, revision)

    def annotate(
        self, name: str, revision: str, *, scores: Mapping[str, float], report_hash: str, gate: str, gate_reason: str
    ) -> AdapterEntry:
        """Write into a revision's card what was measured about it; its content and all else stay as they are."""
        with self._lock():
            entry = self.get(name, revision)
            return self._rewrite(
                entry, scores=dict(scores), report_hash=report_hash, gate=gate, gate_reason=gate_reason
            )

    def promote(self, name: str, revision: str, *, force: str | None = None) -> AdapterEntry:
        """Point `name` at one of its revisions; an earlier one is a rollback.

        One that the gate refused needs `force`, a reason, and its card keeps it. Raises NotProved without.
        """
        with self._lock():
            entry = self.get(name, revision)
            if entry.card.gate == REFUSED and force is not None:
                entry = self._rewrite(entry, gate=FORCED, gate_reason=f"{force}; {entry.card.gate_reason}")
            elif entry.card.gate == REFUSED and not entry.is_current:
                raise NotProved(f"{entry.id} was refused when it was published: {entry.card.gate_reason}")
            self._point(entry.name, entry.revision, self._history(entry.name))
        return replace(entry, is_current=True)

    def rollback(self, name: str, revision: str) -> AdapterEntry:
        """Point `name` back at `revision`, which `previous` gave. Going back twice goes two steps.

        Raises Moved when somebody else moved the name in between.
        """
        with self._lock(), contextlib.suppress(UnknownAdapter):
            entry = self.previous(name)
            if entry.revision == revision:
                history = self._history(name)
                kept = history[: len(history) - history[::-1].index(revision) - 1]
                self._point(entry.name, revision, kept, remember=False)
                return replace(entry, is_current=True)
        raise Moved(f"adapter {name!r} was moved by somebody else a moment ago; look, and try again")

    def revisions(self, name: str) -> set[str]:
        """All that are there, readable or not."""
        return {path.name for path in self._folders(self.path / _checked(name))}

    def previous(self, name: str) -> AdapterEntry:
        """The revision that `name` meant before the current one, of those that are still there."""
        current = self.current(name)
        for revision in reversed(self._history(name)):
            if revision != current and (self.path / name / revision).is_dir():
                return self.get(name, revision)
        if current is None:
            raise self._unknown(name)
        raise UnknownAdapter(f"adapter {name!r} has no earlier revision to go back to")

    def entries(self) -> list[AdapterEntry]:
        """All readable revisions, by name, oldest first; unreadable folders are left out (`get` says why)."""
        found = []
        for name_dir in sorted(self._folders(self.path)):
            for revision_dir in self._folders(name_dir):
                with contextlib.suppress(RegistryError):
                    found.append(self.get(name_dir.name, revision_dir.name))
        return sorted(found, key=lambda entry: (entry.name, entry.card.created, entry.revision))

    def get(self, name: str, revision: str | None = None) -> AdapterEntry:
        """One revision, by default the current one. Raises RegistryError when there is none."""
        name = _checked(name)
        current = self.current(name)
        chosen = _checked_revision(revision) if revision is not None else current
        if chosen is None:
            raise self._unknown(name)
        path = self.path / name / chosen
        try:
            if not path.is_dir():
                raise UnknownAdapter(f"adapter {name!r} has no revision {chosen} in {self.path}")
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise RegistryError(f"{path} leads out of the registry; remove the link and publish the adapter again")
            return AdapterEntry(name, chosen, path, read_card(path), chosen == current)
        except (CardRefused, ConfigError, OSError) as error:
            raise RegistryError(str(error)) from None

    def current(self, name: str) -> str | None:
        """The revision that `name` means; None when there is no such name, or its file is damaged."""
        try:
            return check_revision((self.path / _checked(name) / CURRENT).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError, NameRefused):
            return None

    def remove(self, name: str, revision: str | None = None) -> None:
        """Delete one revision, or the name with all of them. The current revision goes only with its name."""
        name = _checked(name)
        with self._lock():
            if revision is None:
                target = self.path / name
                if not target.is_dir():
                    raise self._unknown(name)
            else:
                entry = self.get(name, revision)
                if entry.is_current:
                    raise RegistryError(f"{entry.id} is current: promote another revision, or remove the whole name")
                target = entry.path
            self._discard(target)
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()  # an import that was refused leaves no empty name

    def check_base(self, name: str, revision: str, card: AdapterCard) -> None:
        """Raises RegistryError where the revision is there, belongs to another base than `card` says, and was used."""
        if (self.path / _checked(name) / _checked_revision(revision)).is_dir():
            self._belongs_elsewhere(self.get(name, revision), card)

    def _mend(self, target: Path, good: Path) -> None:
        """Under the lock: a revision whose files are no longer what its name promises gives way to the good copy.

        Its card stays where it can be read: it says what was proved about the files as they should be.
        """
        with contextlib.suppress(OSError):
            if folder_hash(target) == target.name:
                return
        with contextlib.suppress(CardRefused, ConfigError):
            write_card(good, read_card(target))
        self._discard(target)
        os.replace(good, target)

    def _discard(self, folder: Path) -> None:
        """Under the lock. Renamed first: a reader sees the whole folder or none."""
        doomed = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.path))
        os.replace(folder, doomed / "removed")
        shutil.rmtree(doomed, ignore_errors=True)

    def _publish_again(self, entry: AdapterEntry, card: AdapterCard) -> None:
        """Under the lock: files that are there, with another card. A base named wrongly at first can be put right."""
        if self._belongs_elsewhere(entry, card):
            old = entry.card
            write_card(entry.path, replace(card, name=old.name, revision=old.revision, created=old.created))

    def _belongs_elsewhere(self, entry: AdapterEntry, card: AdapterCard) -> bool:
        old = entry.card
        if not any(a and b and a != b for a, b in zip(_belonging(old), _belonging(card), strict=True)):
            return False
        if entry.is_current or old.gate in (PASSED, FORCED) or entry.revision in self._history(entry.name):
            raise RegistryError(
                f"{entry.id} belongs to the base {old.base_model} with the tokenizer and template of then, and this is "
                f"for {card.base_model}: publish it under another name"
            )
        return True

    def _rewrite(self, entry: AdapterEntry, **facts: Any) -> AdapterEntry:
        """Under the lock: other facts in the card."""
        card = replace(entry.card, **facts)
        write_card(entry.path, card)
        return replace(entry, card=card)

    def _point(self, name: str, revision: str, history: list[str], *, remember: bool = True) -> None:
        """Under the lock. The history is written first: a crash in between loses nothing."""
        before = self.current(name)
        if before == revision:
            return
        if remember and before is not None:
            history = [*history, before]
        write_text(self.path / name / HISTORY, "".join(f"{line}\n" for line in history[-MAX_HISTORY:]))
        write_text(self.path / name / CURRENT, revision + "\n")

    def _history(self, name: str) -> list[str]:
        try:
            lines = (self.path / _checked(name) / HISTORY).read_text(encoding="utf-8").split()
            return [check_revision(line) for line in lines]
        except (OSError, UnicodeDecodeError, NameRefused):
            return []

    def _unknown(self, name: str) -> UnknownAdapter:
        return UnknownAdapter(f"no adapter {name!r} in {self.path}: publish one with `python -m trainer publish`")

    def _fill(self, aside: Path, folder: Path, name: str, card: AdapterCard) -> str:
        for file in REVISION_FILES:
            _copy(folder / file, aside / file)
        check_adapter_folder(aside)  # the copy is what will be served
        revision = folder_hash(aside)
        write_card(aside, replace(card, name=name, revision=revision, created=int(time.time())))
        aside.chmod(0o755)
        return revision

    def _folders(self, parent: Path) -> Iterator[Path]:
        """Those that can be read."""
        with contextlib.suppress(OSError):
            yield from (path for path in parent.iterdir() if os.path.isdir(path) and not path.name.startswith("."))

    def _remove_torn(self) -> None:
        """Under the lock, anything aside was left by a writer that died."""
        for path in self.path.glob(_ASIDE + "*"):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_adapter_folder(folder: Path) -> None:
    """Raise RegistryError unless the folder holds a whole PEFT adapter in safetensors, and can be read."""
    try:
        _check_files(folder)
    except (ConfigError, BrokenFile) as error:
        raise RegistryError(str(error)) from None
    except OSError as error:
        raise RegistryError(f"{folder} cannot be read ({error}); mend that, or copy the adapter again") from None


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder")
    if not (folder / WEIGHTS_NAME).is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise RegistryError(f"{folder}: pickled weights are refused; save the adapter with safe_serialization=True")
        raise RegistryError(f"{folder}: no {WEIGHTS_NAME}, so this is not a trained adapter")
    config = read_json_object(folder / CONFIG_NAME)
    tensors = read_header(folder / WEIGHTS_NAME)
    if not isinstance(config.get("peft_type"), str):
        raise RegistryError(f"{folder / CONFIG_NAME}: has no peft_type, so this is not a PEFT adapter")
    if not tensors:
        raise RegistryError(f"{folder / WEIGHTS_NAME}: holds no tensors; the training run did not finish")


def _copy(source: Path, target: Path) -> None:
    """Flushed to the disk: a crash of the machine must not leave an empty file in what a rename made a revision."""
    try:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise RegistryError(f"{source} cannot be copied into the registry ({error})") from None


def _belonging(card: AdapterCard) -> tuple[str, ...]:
    """Hashes of what an adapter works with; "" where it is not known."""
    return card.base_weights_hash, card.tokenizer_hash, card.chat_template_hash


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except NameRefused as error:
        raise RegistryError(str(error)) from None


def _checked_revision(revision: str) -> str:
    try:
        return check_revision(revision)
    except NameRefused as error:
        raise RegistryError(str(error)) from None
