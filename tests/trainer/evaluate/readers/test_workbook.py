"""A workbook may come from anywhere: what is hostile or broken costs a clear error, and nothing else."""

import datetime
import zipfile
from pathlib import Path

import openpyxl
import pytest

from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.errors import DataError
from trainer.evaluate.items import ChoiceItem
from trainer.evaluate.read_items import read_items
from trainer.evaluate.readers import workbook

ROW = ("一加一", "1", "2", "3", "4", "B")


def rewritten(path: Path, part: str, change: tuple[bytes, bytes]) -> Path:
    """The workbook with one part changed."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    assert change[0] in parts[part]
    parts[part] = parts[part].replace(*change)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return path


def test_a_formula_is_not_run_and_its_stored_value_is_read(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(files.SHEET_HEADER)
    book.active.append(('=WEBSERVICE("http://127.0.0.1/")', "1", "2", "3", "4", "B"))
    book.active.append(("一加一", "1", "2", "3", "4", '="B"'))
    book.active.append(ROW)
    book.save(tmp_path / "exam.xlsx")
    (found,) = read_items(tmp_path / "exam.xlsx")
    assert [(item.line, item.code) for item in found.refused] == [(2, "missing-question"), (3, "missing-answer")]
    assert [item.line for item in found.items] == [4]


def test_numbers_percentages_and_dates_are_read_as_they_are_seen(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(files.SHEET_HEADER)
    book.active.append(("多少", 0.25, 3.0, 2.5, datetime.datetime(2021, 1, 2), "A"))
    book.active["B2"].number_format = "0%"
    book.save(tmp_path / "exam.xlsx")
    (found,) = read_items(tmp_path / "exam.xlsx")
    (item,) = found.items
    assert isinstance(item, ChoiceItem)
    assert item.options == ("25%", "3", "2.5", "2021-01-02")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbook, "MAX_UNPACKED", 1 << 20)
    path = files.write_book(tmp_path / "bomb.xlsx", {"S": [files.SHEET_HEADER, ROW]})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/zeros.bin", bytes(2 << 20))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb\.xlsx: unpacks to 2 MiB, more than 1"):
        read_items(path)


def test_entities_are_refused(tmp_path: Path) -> None:
    path = files.write_book(tmp_path / "laughs.xlsx", {"S": [files.SHEET_HEADER, ROW]})
    laughs = b'<!DOCTYPE worksheet [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><worksheet '
    rewritten(path, "xl/worksheets/sheet1.xml", (b"<worksheet ", laughs))
    with pytest.raises(DataError, match=r"laughs\.xlsx: defines XML entities"):
        read_items(path)


def test_a_sheet_that_claims_to_be_endless_is_read_to_its_rows(tmp_path: Path) -> None:
    path = files.write_book(tmp_path / "wide.xlsx", {"S": [files.SHEET_HEADER, ROW]})
    sheet = "xl/worksheets/sheet1.xml"
    rewritten(path, sheet, (b'<dimension ref="A1:F2"', b'<dimension ref="A1:XFD1048576"'))
    rewritten(path, sheet, (b'<row r="2"', b'<row r="99999"'))
    (found,) = read_items(path)
    assert [item.line for item in found.items] == [99999]
    assert not found.refused


def test_shared_and_formatted_strings_as_excel_writes_them(tmp_path: Path) -> None:
    path = files.write_book(tmp_path / "excel.xlsx", {"S": [files.SHEET_HEADER, ROW]})
    strings = (
        b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
        b"<si><r><t>one </t></r><r><rPr><b/></rPr><t>plus one</t></r></si></sst>"
    )
    relation = (
        b'<Relationship Id="s1" Target="sharedStrings.xml" '
        b'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/sharedStrings"/></Relationships>'
    )
    kind = (
        b'<Override PartName="/xl/sharedStrings.xml" '
        b'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/></Types>'
    )
    cell = b'<c r="A2" t="inlineStr"><is><t>&#19968;&#21152;&#19968;</t></is></c>'
    rewritten(path, "xl/worksheets/sheet1.xml", (cell, b'<c r="A2" t="s"><v>0</v></c>'))
    rewritten(path, "xl/_rels/workbook.xml.rels", (b"</Relationships>", relation))
    rewritten(path, "[Content_Types].xml", (b"</Types>", kind))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("xl/sharedStrings.xml", strings)
    (found,) = read_items(path)
    (item,) = found.items
    assert isinstance(item, ChoiceItem)
    assert (item.question, item.letters) == ("one plus one", "B")


def test_what_was_read_before_a_broken_row_stays(tmp_path: Path) -> None:
    rows = [(f"一加{number}", "1", "2", "3", "4", "B") for number in range(3)]
    path = files.write_book(tmp_path / "cut.xlsx", {"S": [files.SHEET_HEADER, *rows], "T": [files.SHEET_HEADER, ROW]})
    rewritten(path, "xl/worksheets/sheet1.xml", (b'<row r="4"', b'<row <r="4"'))
    (found,) = read_items(path)
    assert [item.line for item in found.items] == [2, 3, 2]  # and the next sheet
    assert [(item.source, item.line, item.code) for item in found.refused] == [(f"{path}#S", 4, "broken-sheet")]


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a zip", b"PK\x03\x04" + bytes(100), b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)]
)
def test_what_is_no_workbook_is_said_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "exam.xlsx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"exam\.xlsx: is not a readable \.xlsx workbook"):
        read_items(path)
