from pathlib import Path
from typing import Any

import pytest

from server.store.safetensors_check import BrokenFile, read_header
from tests.server.store.safetensors_files import write_safetensors


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


def test_a_whole_file_gives_its_tensors(tmp_path: Path) -> None:
    header = _tensor() | {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
    }
    path = write_safetensors(tmp_path / "x", b"\0" * 18, header)
    assert set(read_header(path)) == {"weight", "b"}


@pytest.mark.parametrize(
    "header",
    [
        _tensor(shape=[5]),
        _tensor(shape=[-4]),
        _tensor(shape="4"),
        _tensor(shape=[float("nan")]),
        _tensor(data_offsets=[0, 20]),
        _tensor(data_offsets=[16, 0]),
        _tensor(data_offsets=[4, 20]),
        _tensor(data_offsets=[0]),
        _tensor(dtype=3),
        {"weight": []},
        [],
        _tensor() | {"hole": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}},
        {"weight": _tensor()["weight"], "same": _tensor()["weight"]},
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BrokenFile, match="x"):
        read_header(write_safetensors(tmp_path / "x", b"\0" * 16, header))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 64, b"version https://git-lfs"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(BrokenFile):
        read_header(path)


def test_real_safetensors_files_pass(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    save_file({"a": numpy.ones((3, 5), "float32"), "b": numpy.zeros(0, "int64")}, tmp_path / "x", {"format": "pt"})
    assert read_header(tmp_path / "x")["a"]["shape"] == [3, 5]
