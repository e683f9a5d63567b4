"""Which files are read, in which encoding, and whatever their names say."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.errors import ConfigError
from trainer.data import json_values
from trainer.data.files import encoding_of, select
from trainer.data.json_values import LostTrack, array_values
from trainer.data.read import read_rows
from trainer.data.rows import Row
from trainer.errors import DataError

ROWS = [{"question": f"第 {i} 问\u2028？", "answer": f"第 {i} 答\u0085。"} for i in range(5)]
EXPECTED = [(row["question"], row["answer"]) for row in ROWS]
FORMS = {
    "array": json.dumps(ROWS, ensure_ascii=False),
    "pretty array": json.dumps(ROWS, ensure_ascii=False, indent=4),
    "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "lines and blank ones": "\n\n" + "\r\n \r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
    "objects over several lines": "\n".join(json.dumps(row, ensure_ascii=False, indent=1) for row in ROWS),
    "escaped": json.dumps(ROWS, indent="\t").replace("\n", "\r\n"),
    "csv": "question,answer\n" + "\n".join(f"{q},{a}" for q, a in EXPECTED),
    "tsv": "question\tanswer\r\n" + "\r\n".join(f"{q}\t{a}" for q, a in EXPECTED) + "\r\n",
}


def texts(path: Path) -> list[tuple[str, str]]:
    found = [row for row in read_rows([path], "sft") if isinstance(row, Row)]
    return [(row.messages[0]["content"], row.messages[1]["content"]) for row in found]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_content_decides_not_the_name(tmp_path: Path, form: str, encoding: str) -> None:
    for suffix in (".json", ".jsonl", ".csv", ".txt"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(FORMS[form].encode(encoding))
        assert texts(path) == EXPECTED, suffix


def test_gbk_is_told_from_utf8_by_most_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = '{"text": "天空是蓝的，草是绿的"}\n'
    path.write_bytes(good.encode() * 5 + good.encode("gbk"))
    assert encoding_of(path) == "utf-8"
    path.write_bytes(good.encode("gbk") * 5 + good.encode())
    assert encoding_of(path) == "gb18030"


def test_the_encoding_is_found_behind_a_long_start_of_ascii(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 200_000 + '{"text": "天空是蓝的"}'.encode("gbk"))
    assert encoding_of(path) == "gb18030"
    path.write_bytes(codecs.BOM_UTF8)
    assert encoding_of(path) == "utf-8-sig"


def test_folders_patterns_and_limits(tmp_path: Path) -> None:
    for name in ("a/2.jsonl", "a/1.json", "a/b/3.txt", "a/.hidden/4.jsonl", "a/readme.pdf", "a/5#2.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n' * 3)
    here = str(tmp_path)
    names = [[str(file.relative_to(here)) for file in s.files] for s in select([f"{here}/a", f"{here}/a/*.json*"])]
    assert names == [["a/1.json", "a/2.jsonl", "a/5#2.jsonl", "a/b/3.txt"], ["a/1.json", "a/2.jsonl", "a/5#2.jsonl"]]
    assert select([f"{here}/a/5#2.jsonl"])[0].limit is None
    assert select([f"{here}/a/5#2.jsonl#2"])[0].limit == 2
    assert len(list(read_rows([f"{here}/a#4", tmp_path / "a" / "2.jsonl"], "pt"))) == 7


@pytest.mark.parametrize("path", ["missing.jsonl", "missing/*.json", "missing.json#10", "empty"])
def test_a_path_that_names_nothing_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=path.split("#")[0].replace("*", r"\*")):
        list(read_rows([tmp_path / path], "sft"))


def test_values_longer_than_the_window_and_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": "x" * 50, "b": [1.5, -2, True, None, {"c": '"]}\\ 😀'}]}, 12345, "s" * 30, [], [[]], 7]
    text = json.dumps(values)
    for step in range(1, 24):
        monkeypatch.setattr(json_values, "_STEP", step)
        path = tmp_path / "x.json"
        path.write_text(text)
        with path.open() as stream:
            assert [found.value for found in array_values(stream)] == values


def test_broken_utf16_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('[{"text": "a"}]'.encode("utf-16") + b"a")
    with pytest.raises(DataError, match=r"x\.json: is not valid utf-16.*UTF-8"):
        list(read_rows([tmp_path / "x.json"], "pt"))


def test_an_array_whose_rows_cannot_be_told_apart_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "LONGEST", 1000)
    monkeypatch.setattr(json_values, "_STEP", 100)
    path = tmp_path / "x.json"
    path.write_text('[{"a": {"b": "' + "c" * 5000 + "}]")
    with path.open() as stream, pytest.raises(LostTrack, match="row 1 "):
        list(array_values(stream))
    with pytest.raises(DataError, match=r"x\.json: row 1 .*mend it"):
        list(read_rows([path], "sft"))


def test_a_line_that_is_too_long_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "LONGEST", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a" * size}) for size in (10, 5000, 20)))
    assert [(row.line, getattr(row, "code", "")) for row in read_rows([path], "pt")] == [
        (1, ""),
        (2, "row-too-large"),
        (3, ""),
    ]


@pytest.mark.parametrize("form", ["array", "lines", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    """A file of 18 MB must not take more than 6 MB above a file of 1 MB."""
    peaks = []
    for count in (1_000, 20_000):
        path = tmp_path / f"{count}.data"
        row = {"question": "q", "answer": "天" * 300}
        line = json.dumps(row, ensure_ascii=False)
        with path.open("w", encoding="utf-8") as file:
            file.write({"array": "[", "lines": "", "csv": "question,answer\n"}[form])
            for i in range(count):
                if form == "csv":
                    file.write(f"{i},{row['answer']}\n")
                else:
                    file.write(line.replace('"q"', f'"{i}"') + (",\n" if form == "array" and i < count - 1 else "\n"))
            file.write("]" if form == "array" else "")
        peaks.append(_peak(path))
    assert peaks[1] - peaks[0] < 6 * 1024, peaks


def _peak(path: Path) -> int:
    """KiB of resident memory at its highest, in a process of its own."""
    code = (
        "import resource, sys; from trainer.data.read import read_rows\n"
        "print(sum(1 for _ in read_rows([sys.argv[1]], 'sft')), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, peak = map(int, result.stdout.split())
    assert count == int(path.stem)
    return peak


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3)
    assert [len(list(read_rows([path], "pt"))) for path in ("~/a.jsonl", "~/a.jsonl#2", "~/*.jsonl")] == [3, 2, 3]
