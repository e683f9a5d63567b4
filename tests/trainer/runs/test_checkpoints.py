"""A checkpoint is whole or it is not used; what is wrong with it is said."""

import json
from pathlib import Path

import pytest

from trainer.runs.checkpoints import (
    MANIFEST,
    Torn,
    checkpoint_folders,
    discard,
    is_sealed,
    last_complete,
    read_checkpoint,
    rotate,
    seal,
)


def written(run: Path, step: int, *, sealed: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global_step1").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step % 256]) * 100)
    (folder / "global_step1" / "rank_0.pt").write_bytes(b"optimizer")
    if sealed:
        seal(folder, step, {"learning_rate": 0.1})
    return folder


def test_a_sealed_checkpoint_is_read_back(tmp_path: Path) -> None:
    folder = written(tmp_path, 7)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.path, checkpoint.name, checkpoint.step) == (folder, "checkpoint-7", 7)
    assert checkpoint.identity == {"learning_rate": 0.1}


def test_the_manifest_names_every_file_and_the_pickle_is_gone(tmp_path: Path) -> None:
    folder = written(tmp_path, 7, sealed=False)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    seal(folder, 7, {})
    assert not (folder / "training_args.bin").exists()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["adapter_model.safetensors", "global_step1/rank_0.pt"]
    assert manifest["files"]["global_step1/rank_0.pt"]["size"] == 9


def test_a_kill_while_the_manifest_is_written_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path, 7, sealed=False)
    (folder / ".manifest.json.x1").write_text("{")  # what write_json leaves when it is killed
    with pytest.raises(Torn, match="no manifest"):
        read_checkpoint(folder)
    seal(folder, 7, {})
    assert read_checkpoint(folder).step == 7


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "no manifest"),
        (lambda folder: (folder / MANIFEST).write_text('{"step"'), "manifest cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"format_version": 1}'), "manifest cannot be read"),
        (lambda folder: rewritten(folder, format_version=2), "has format 2; this version reads 1"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"x"), "optimizer.pt is not in its manifest"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "has 99 bytes instead of 100"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100), "its sha256 differs"),
        (lambda folder: (folder / "global_step1" / "rank_0.pt").write_bytes(b"optimizeR"), "rank_0.pt is not what was"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, harm: object, reason: str) -> None:
    folder = written(tmp_path, 7)
    harm(folder)  # type: ignore[operator]
    with pytest.raises(Torn, match=reason):
        read_checkpoint(folder)


def rewritten(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_the_newest_whole_one_is_taken_and_torn_ones_are_named(tmp_path: Path) -> None:
    written(tmp_path, 9)
    written(tmp_path, 20)
    broken = written(tmp_path, 100)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    killed = written(tmp_path, 30, sealed=False)
    old = written(tmp_path, 5, sealed=False)
    (tmp_path / "checkpoint-x").mkdir()  # not ours
    found, torn = last_complete(tmp_path)
    assert found is not None and found.step == 20
    assert [folder for folder, _ in torn] == [broken, killed, old]
    assert last_complete(tmp_path / "empty") == (None, [])


def test_rotation_keeps_the_newest_whole_ones_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        written(tmp_path, step)
    written(tmp_path, 5, sealed=False)
    rotate(tmp_path, None)
    assert len(checkpoint_folders(tmp_path)) == 5
    rotate(tmp_path, 2, keep=[tmp_path / "checkpoint-1"])
    assert [folder.name[11:] for folder in checkpoint_folders(tmp_path)] == ["1", "3", "4", "5"]


def test_what_is_being_removed_is_torn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert not is_sealed(folder)
