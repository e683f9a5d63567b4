"""Damaged copies of every file: read, refused item by item, or named in one error; never anything else."""

from pathlib import Path
from random import Random

import pytest

from server.errors import ConfigError
from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.errors import DataError
from trainer.evaluate.items import LETTERS, ChoiceItem, Item, SqlItem, TextItem
from trainer.evaluate.read_items import read_items

NUM_COPIES = 12  # of each file
JUNK = (
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\xed\xa0\x80",
    b"A.",
    b"null",
    b"\\ud800",
    b"\xef\xbb\xbf",
)


def cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def shuffled(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    middle = list(content[start : start + random.randrange(2, 200)])
    random.shuffle(middle)
    return content[:start] + bytes(middle) + content[start + len(middle) :]


def overwritten(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.randrange(1, 20)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def with_junk(content: bytes, random: Random) -> bytes:
    for _ in range(random.randrange(1, 8)):
        at = random.randrange(len(content))
        content = content[:at] + random.choice(JUNK) * random.randrange(1, 4) + content[at:]
    return content


def without_a_piece(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + content[start + random.randrange(1, 100) :]


DAMAGES = (cut, shuffled, overwritten, with_junk, without_a_piece)


def check(item: Item) -> None:
    """What every later step relies on."""
    assert item.item_id
    assert item.subject.encode()
    if isinstance(item, ChoiceItem):
        assert 2 <= len(item.options) <= len(LETTERS)
        assert all(option.strip() and option.encode() for option in item.options)
        assert item.answers
        assert list(item.answers) == sorted(set(item.answers))
        assert 0 <= item.answers[0] <= item.answers[-1] < len(item.options)
        assert item.question.strip() and item.question.encode()
    elif isinstance(item, TextItem):
        assert item.messages[-1]["role"] == "user"
        assert all(message["content"].encode() for message in item.messages if message["role"] == "user")
        assert item.references and all(text.strip() and text.encode() for text in item.references)
    else:
        assert isinstance(item, SqlItem)
        assert item.question.strip() and item.schema and all(item.queries)


def read_checked(path: Path) -> int:
    try:
        found = read_items(path)
    except (DataError, ConfigError) as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return 0
    for item_set in found:
        assert len({item.item_id for item in item_set.items}) == len(item_set.items)
        for item in item_set.items:
            check(item)
        for refused in item_set.refused:
            assert refused.source.startswith(str(path.parent))
            assert refused.code
            assert "\n" not in refused.detail
    return sum(len(item_set.items) for item_set in found)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_harmless(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    random = Random(damage.__name__)
    num_read = 0
    for path in files.write_all(tmp_path):
        content = path.read_bytes()
        for _ in range(NUM_COPIES):
            path.write_bytes(damage(content, random))
            is_beside = path.suffix in (".sqlite", ".txt") or path.name == "tables.json"
            num_read += read_checked(tmp_path / path.relative_to(tmp_path).parts[0] if is_beside else path)
        path.write_bytes(content)
    assert num_read > 50  # the rest of a damaged file is still read


def test_whole_files_are_read_whole(tmp_path: Path) -> None:
    files.write_all(tmp_path)
    assert sum(map(read_checked, tmp_path.iterdir())) == 40


@pytest.mark.parametrize("seed", range(10))
def test_noise_under_any_name_is_harmless(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    for suffix in (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".txt"):
        for content in (
            random.randbytes(400),
            bytes(random.choices(b'{}[]",:\n A1;', k=400)),
            b"PK\x03\x04" + random.randbytes(400),
        ):
            path = tmp_path / f"noise{suffix}"
            path.write_bytes(content)
            read_checked(path)
