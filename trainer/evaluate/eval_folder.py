"""An evaluation's folder: `eval.json` says what is evaluated, `items.jsonl` grows with it, `result.json` is last.

A folder without `result.json` is unfinished; the same evaluation goes on in it, another one is refused.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import msgspec

from server.errors import ConfigError
from server.store.hashes import write_json, write_text
from server.store.model_folder import read_json_object
from trainer.errors import DataError, DriftError
from trainer.evaluate.results import EvalResult, ItemScore

RECORD, ITEMS, RESULT, LOCK = "eval.json", "items.jsonl", "result.json", ".lock"
EVAL_FORMAT = 1


class EvalFolder:
    """Owned by one process while it is entered. Raises ConfigError when another one has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        self._items = -1

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{self.path}: is no folder; choose another --output") from None
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"{self.path}: another process is evaluating into it; wait, or choose another --output"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self._items, self._lock):
            if handle >= 0:
                os.close(handle)

    def begin(self, record: Mapping[str, Any], *, again: bool = False) -> dict[tuple[str, str], ItemScore]:
        """Start, or go on: the items that are scored already, by task and id. `record` is all that decides figures;
        `again` forgets what the folder holds of the same candidate and tasks.

        Raises DriftError when the folder belongs to another evaluation, naming every difference, and DataError when
        its items cannot be read.
        """
        is_begun = (self.path / RECORD).is_file()
        if is_begun and (differences := differences_of(self.path, record, again=again)):
            raise DriftError(
                f"{self.path} holds another evaluation ({'; '.join(differences)}); choose another --output, or take "
                "the settings and files that it began with"
            )
        if again:
            for name in (RESULT, ITEMS, RECORD):
                (self.path / name).unlink(missing_ok=True)
        if again or not is_begun:
            write_json(self.path / RECORD, _numbered(record))
        cut_torn_line(self.path / ITEMS)
        done = read_scores(self.path)
        self._items = os.open(self.path / ITEMS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return done

    def reopen(self) -> None:
        """Unfinished again: items are about to be asked, and figures without them are not its own."""
        (self.path / RESULT).unlink(missing_ok=True)

    def append(self, score: ItemScore) -> None:
        line = json.dumps(asdict(score), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        os.write(self._items, line)  # one write: a kill leaves whole lines, but perhaps the last

    def finish(self, result: EvalResult) -> None:
        os.fsync(self._items)
        text = json.dumps(asdict(result), ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
        write_text(self.path / RESULT, text + "\n")


def read_result(path: Path) -> EvalResult:
    """Of a finished evaluation. Raises ConfigError when it is none."""
    if not (path / RESULT).is_file():
        raise ConfigError(
            f"{path}: no {RESULT}, so this is no finished evaluation; run the same command again to go on"
        )
    try:
        return msgspec.convert(read_json_object(path / RESULT), EvalResult)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path / RESULT}: {error}") from None


def read_scores(path: Path) -> dict[tuple[str, str], ItemScore]:
    """By task and item id; an item that was asked again counts as it came last. Raises DataError for a damaged line."""
    found: dict[tuple[str, str], ItemScore] = {}
    try:
        lines = (path / ITEMS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    for number, line in enumerate(lines, 1):
        if line:
            try:
                score = msgspec.json.decode(line, type=ItemScore)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path / ITEMS}, line {number}: {error}; delete that line, and its item is asked again"
                ) from None
            found[score.task, score.item_id] = score
    return found


def differences_of(path: Path, record: Mapping[str, Any], *, again: bool = False) -> list[str]:
    """What `record` has otherwise than the evaluation in the folder `path`: `settings.shots: 5, now 0`. `again`: only
    what makes it another candidate's, or one of other tasks."""
    known = read_json_object(path / RECORD) if (path / RECORD).is_file() else {}
    wanted = json.loads(json.dumps(_numbered(record)))
    if again:
        # A limit or examples change what is asked of the same file: then tasks are known by their names.
        is_same = all(known.get(key) == wanted.get(key) for key in ("rules", "settings"))
        known, wanted = _subject(known, is_same), _subject(wanted, is_same)
    return _differences(known, wanted)


def cut_torn_line(path: Path) -> None:
    """A kill may have left half a line at the end: its item is asked again."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _subject(record: Mapping[str, Any], with_digests: bool) -> dict[str, Any]:
    """Who is asked what."""
    tasks = record.get("tasks", {})
    return {"candidate": record.get("candidate"), "tasks": tasks if with_digests else dict.fromkeys(tasks, True)}


def _numbered(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"format_version": EVAL_FORMAT, **record}


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted({*known, *wanted}):
        before, now = known.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{key}.{line}" for line in _differences(before, now)]
        elif before != now:
            found.append(f"{key}: {_short(before)}, now {_short(now)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
