"""Checkpoints that cannot lie: a manifest with every file's size and sha256, written last, by rename.

What is inside a checkpoint is transformers' affair. A folder without a manifest, or one that differs from it, is torn:
it is named, and never loaded. Nothing here imports torch.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.hashes import file_hash, write_json
from server.store.model_folder import read_json_object

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
PICKLED = "training_args.bin"  # a pickle that nobody reads back; the manifest says the same in plain JSON
_NAME = re.compile(r"checkpoint-(\d+)")


class Torn(Exception):
    """Why a checkpoint folder cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: every file is as it was written. `identity` is what the run was, see `trainer.runs.resume`."""

    path: Path
    step: int
    identity: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name


def seal(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole. Call it when every process has written its part."""
    (folder / PICKLED).unlink(missing_ok=True)
    files = {name: {"size": path.stat().st_size, "sha256": file_hash(path)} for name, path in _files(folder).items()}
    write_json(
        folder / MANIFEST,
        {"format_version": MANIFEST_FORMAT, "step": step, "identity": dict(identity), "files": files},
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Compare a folder with its manifest, byte for byte. Raises Torn, saying what is wrong."""
    if not (folder / MANIFEST).is_file():
        raise Torn("it has no manifest, so it was not written to the end")
    try:
        manifest = read_json_object(folder / MANIFEST)
        version, step = manifest["format_version"], manifest["step"]
        identity, files = dict(manifest["identity"]), dict(manifest["files"])
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise Torn(f"its manifest cannot be read ({error})") from None
    if version != MANIFEST_FORMAT or not isinstance(step, int):
        raise Torn(f"its manifest has format {version}; this version reads {MANIFEST_FORMAT}")
    _compare(_files(folder), expected)
    return Checkpoint(folder, step, identity)


def last_complete(run: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a run, and the torn folders that were passed over, each with its reason."""
    torn: list[tuple[Path, str]] = []
    found: Checkpoint | None = None
    for folder in reversed(checkpoint_folders(run)):
        if found and (folder / MANIFEST).is_file():
            continue  # older than what is taken: not worth reading
        try:
            checkpoint = read_checkpoint(folder)
        except Torn as error:
            torn.append((folder, str(error)))
        else:
            found = checkpoint
    return found, torn


def checkpoint_folders(run: Path) -> list[Path]:
    """All of them, whole or torn, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def discard(folder: Path) -> None:
    """Remove a checkpoint; killed in the middle, it leaves a torn one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate(run: Path, limit: int | None, keep: Iterable[Path] = ()) -> None:
    """Keep the newest `limit` whole checkpoints and those in `keep`. Called after a seal: one is always left."""
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    sealed = [folder for folder in checkpoint_folders(run) if is_sealed(folder)]
    for folder in sealed[:-limit]:
        if folder.resolve() not in kept:
            discard(folder)


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # A dot file beside the manifest is what a killed write leaves.
    return {str(p.relative_to(folder)): p for p in paths if p.name != MANIFEST and not p.name.startswith(".manifest")}


def _compare(found: Mapping[str, Path], expected: Mapping[str, tuple[int, str]]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise Torn(f"{name} is {'missing' if name in expected else 'not in its manifest'}")
    for name, (size, _) in expected.items():
        if found[name].stat().st_size != size:
            raise Torn(f"{name} has {found[name].stat().st_size} bytes instead of {size}")
    for name, (_, digest) in expected.items():
        if file_hash(found[name]) != digest:
            raise Torn(f"{name} is not what was written: its sha256 differs")
