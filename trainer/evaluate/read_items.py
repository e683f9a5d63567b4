"""Files of benchmarks -> sets of items, and what could not be read of them. The one way into evaluation for questions.

Knows which files belong together (splits, worked examples); the shapes of files are known in `readers`.
"""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from trainer.data.rows import RowRefused
from trainer.errors import DataError
from trainer.evaluate.items import ChoiceItem, Item, ItemSet, RefusedItem, SqlItem, TextItem
from trainer.evaluate.readers import bbh, naming
from trainer.evaluate.readers.choice import Choice
from trainer.evaluate.readers.choice_keys import SUBJECT_KEYS
from trainer.evaluate.readers.kinds import Draft, Kind, Shape, questions_of
from trainer.evaluate.readers.records import Record
from trainer.evaluate.readers.sql import Query
from trainer.evaluate.readers.text import Asked

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")
# What lies beside questions and holds none.
_BESIDE = frozenset(("tables.json", "few_shot_prompts.csv", "dataset_info.json", "dataset_infos.json"))
_SCORED_SPLITS = ("test", "val", "valid", "validation")
_LONGEST_SUBJECT = 80


def read_items(path: Path, kind: Kind | None = None) -> list[ItemSet]:
    """The benchmarks of a file or a folder, in reading order; ids are the same on every run.

    Without a kind each file is read as what it seems to be. Questions of a dev split are examples where the benchmark
    has another split, also when the path names the other split only (`ceval/val` takes its examples of `ceval/dev`).
    A question that cannot be scored, and in a folder a file that cannot be read, becomes a RefusedItem. Raises
    ConfigError (no such path) and DataError (the file is broken as a whole, or there is nothing to read).
    """
    path = Path(path)
    files = _files(path)
    sets: dict[str, ItemSet] = {}
    for file in files:
        try:
            _read_file(file, kind, sets)
        except (ConfigError, DataError) as error:
            if len(files) == 1:
                raise
            name = naming.set_name(file)
            detail = str(error).removeprefix(f"{file}: ")
            _set_of(sets, name).refused.append(_refused(name, str(file), 0, RowRefused("unreadable-file", detail)))
    _add_shown(path, sets)
    found = [_finished(item_set) for item_set in sets.values() if item_set.items or item_set.refused]
    if not found:
        raise DataError(f"{path}: holds no question of a known shape; docs/benchmarks.md lists them")
    return found


def with_examples(item_set: ItemSet, count: int) -> ItemSet:
    """The set with `count` examples per subject, of questions with options or with one exact answer.

    A subject with examples of its own (a dev split, worked examples) keeps just those. Of any other the first scored
    items become examples, and are no longer scored; one at least stays, so that no subject is lost.
    """
    missing = _missing(item_set.items, count)
    items: list[Item] = []
    for item in item_set.items:
        if missing[_group(item)] <= 0:
            items.append(item)
        else:
            missing[_group(item)] -= 1
            items.append(_as_example(item, True))
    return replace(item_set, items=items)


def _missing(items: list[Item], count: int) -> Counter[tuple[str, str]]:
    """How many examples each group lacks and can give."""
    own = {_group(item) for item in items if _is_example(item)}
    sizes = Counter(map(_group, items))
    return Counter(
        {group: min(count, size - 1) for group, size in sizes.items() if group[0] != "open" and group not in own}
    )


def _group(item: Item) -> tuple[str, str]:
    """Kind and subject: the items that can be one another's examples. Open ones are nobody's."""
    if isinstance(item, ChoiceItem):
        return "choice", item.subject
    return "exact" if isinstance(item, TextItem) and item.is_exact else "open", item.subject


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"{path}: cannot be read (no such file or folder)")
    if not path.is_dir():
        return [path]
    files = _below(path)
    if not files:
        raise DataError(f"{path}: holds no file of questions ({', '.join(SUFFIXES)})")
    return files


def _below(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if _is_benchmark(file.relative_to(folder)) and file.is_file()]


def _is_benchmark(path: Path) -> bool:
    is_hidden = any(part.startswith((".", "~$", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not is_hidden and path.name not in _BESIDE


def _add_shown(path: Path, sets: dict[str, ItemSet]) -> None:
    """Examples of the dev split beside, when the path names one of the others."""
    folder = path if path.is_dir() else path.parent
    if folder.name.lower() not in _SCORED_SPLITS or not (folder.parent / "dev").is_dir():
        return
    subjects = {(name, item.subject) for name, item_set in sets.items() for item in item_set.items}
    shown: dict[str, ItemSet] = {}
    for file in _below(folder.parent / "dev"):
        with suppress(ConfigError, DataError):  # examples that are missing are no fault of what was asked for
            _read_file(file, "choice", shown)
    for name, item_set in shown.items():
        if name in sets:
            sets[name].items += [item for item in item_set.items if (name, item.subject) in subjects]


def _read_file(path: Path, kind: Kind | None, sets: dict[str, ItemSet]) -> None:
    found = questions_of(path, kind)
    name = _benchmark(path, found.shape, found.sample)
    item_set = _set_of(sets, name)
    for record, draft in found.drafts:
        if isinstance(draft, RowRefused):
            item_set.refused.append(_refused(name, record.source, record.line, draft))
        else:
            item_set.items.append(_item(name, path, found.shape, record, draft))
            for note in getattr(draft, "notes", ()):
                item_set.notes[note] = item_set.notes.get(note, 0) + 1
    prompts = bbh.prompt_path(path) if found.shape == "bbh" else None
    if prompts:
        _add_worked(prompts, path.stem, item_set)


def _add_worked(path: Path, subject: str, item_set: ItemSet) -> None:
    name = item_set.benchmark
    for number, asked in enumerate(bbh.prompt_examples(path), 1):
        if isinstance(asked, RowRefused):
            item_set.refused.append(_refused(name, str(path), number, asked))
        else:
            record = Record(str(path), number, None)
            item_set.items.append(_text_item(name, subject, record, asked, is_exact=True, is_example=True))


def _set_of(sets: dict[str, ItemSet], name: str) -> ItemSet:
    return sets.setdefault(name, ItemSet(name))


def _refused(name: str, source: str, line: int, refusal: RowRefused) -> RefusedItem:
    return RefusedItem(benchmark=name, source=source, line=line, code=refusal.code, detail=refusal.detail)


def _benchmark(path: Path, shape: Shape, record: Record) -> str:
    if shape in ("option_text", "bbh"):
        return shape
    if shape in ("choice", "exact"):
        return naming.choice_benchmark(path, record.value if isinstance(record.value, dict) else {}, record.form)
    return naming.set_name(path)


def _item(name: str, path: Path, shape: Shape, record: Record, draft: Draft) -> Item:
    if isinstance(draft, Choice):
        return ChoiceItem(
            item_id="",
            benchmark=name,
            subject=_subject(path, record.value),
            question=draft.question,
            options=draft.options,
            answers=draft.answers,
            is_multiple=draft.is_multiple,
            is_example=naming.is_dev(path),
            source=record.source,
            line=record.line,
        )
    if isinstance(draft, Query):
        return SqlItem(
            item_id="",
            benchmark=name,
            subject=draft.database_name,
            question=draft.question,
            schema=draft.schema,
            queries=draft.queries,
            database=draft.database,
            source=record.source,
            line=record.line,
        )
    assert isinstance(draft, Asked)
    subject = path.stem if shape in ("bbh", "exact") else _subject(path, record.value)
    return _text_item(name, subject, record, draft, is_exact=shape in ("bbh", "exact"))


def _text_item(
    name: str, subject: str, record: Record, asked: Asked, *, is_exact: bool, is_example: bool = False
) -> TextItem:
    return TextItem(
        item_id="",
        benchmark=name,
        subject=subject,
        messages=asked.messages,
        references=asked.references,
        is_exact=is_exact,
        is_example=is_example,
        source=record.source,
        line=record.line,
    )


def _subject(path: Path, value: Any) -> str:
    """As the record says, else as the file is called."""
    given = (value.get(key) for key in SUBJECT_KEYS) if isinstance(value, dict) else ()
    found = next((text.strip() for text in given if isinstance(text, str) and text.strip()), "")
    is_name = 0 < len(found) <= _LONGEST_SUBJECT and found.isprintable()
    return found if is_name else naming.subject_name(path)


def _finished(item_set: ItemSet) -> ItemSet:
    """With ids; and a dev split is scored when it is all there is."""
    items = item_set.items
    if all(_is_example(item) for item in items):
        items = [_as_example(item, False) for item in items]
    return replace(item_set, items=_with_ids(items))


def _is_example(item: Item) -> bool:
    return not isinstance(item, SqlItem) and item.is_example


def _as_example(item: Item, is_example: bool) -> Item:
    return item if isinstance(item, SqlItem) else replace(item, is_example=is_example)


def _with_ids(items: Iterable[Item]) -> list[Item]:
    """Ids are hashes of what is asked and what is right; a repeated question has its number behind it."""
    seen: Counter[str] = Counter()
    made = []
    for item in items:
        digest = sha256(json.dumps(_content(item)).encode()).hexdigest()[:16]
        seen[digest] += 1
        made.append(replace(item, item_id=digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"))
    return made


def _content(item: Item) -> list[Any]:
    if isinstance(item, ChoiceItem):
        return [item.subject, item.is_example, item.question, item.options, item.answers]
    if isinstance(item, TextItem):
        return [item.subject, item.is_example, [dict(message) for message in item.messages], item.references]
    return [item.subject, item.question, item.queries]
