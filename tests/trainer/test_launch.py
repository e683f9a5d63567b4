"""Which processes are started, what they are told, and what comes back from them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from tests.services import ROOT
from trainer.config import TrainConfig
from trainer.errors import ConfigFaults, DoesNotFit
from trainer.launch import NCCL_OFF, _ended, check_gpus_free, check_packages, nccl_settings, one_gpu, torchrun_command
from trainer.machine import Machine, gpu_holders, gpu_names
from trainer.options.zero import ZERO_NAMES, deepspeed_config

CPU = Machine()
TWO = Machine(("NVIDIA GeForce RTX 4090",) * 2)
WORDS = ["train", "my run.yaml", "model=a b"]


def command(machine: Machine, environment: dict[str, str] | None = None, **options: Any) -> list[str] | None:
    config = TrainConfig(model_name_or_path="m", train_file=("d",), **options)
    return torchrun_command(config, machine, WORDS, environment or {})


def test_one_process_is_not_launched() -> None:
    assert command(CPU) is None
    assert command(Machine(("NVIDIA H200",))) is None
    assert command(TWO, num_processes=1) is None


def test_a_single_process_sees_a_single_gpu() -> None:
    """With more, transformers' Trainer would wrap the model in DataParallel, which no part of ours knows."""
    assert one_gpu(TWO, {}) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert one_gpu(TWO, {"CUDA_VISIBLE_DEVICES": "3, 1"}) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert one_gpu(Machine(("NVIDIA H200",)), {}) == one_gpu(CPU, {}) == {}


def test_ppo_is_one_process_on_any_machine() -> None:
    assert command(TWO, stage="ppo", reward_model="r") is None


def test_several_gpus_are_several_processes_and_words_with_spaces_stay_whole() -> None:
    made = command(TWO)
    assert made is not None
    assert made[:5] == [sys.executable, "-m", "trainer.agent", "--nproc_per_node", "2"]
    assert made[5:] == ["--standalone", "--module", "trainer", *WORDS]


@pytest.mark.parametrize("options", [{"deepspeed": "zero2", "num_processes": 1}, {"fsdp": "fsdp2", "num_processes": 1}])
def test_deepspeed_and_fsdp_get_a_process_group_even_alone(options: dict[str, Any]) -> None:
    made = command(Machine(("NVIDIA H200",)), **options)
    assert made is not None and made[4] == "1"


def test_ranks_on_a_cpu_are_named_by_the_user() -> None:
    made = command(CPU, num_processes=2)
    assert made is not None and made[4] == "2"
    made = command(CPU, {"NPROC_PER_NODE": "3"})
    assert made is not None and made[4] == "3"
    with pytest.raises(ConfigError, match="num_processes=3: there are 2 GPUs"):
        command(TWO, num_processes=3)


def test_several_machines_follow_the_usual_variables() -> None:
    places = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    made = command(TWO, places)
    assert made is not None
    assert made[5:13] == [
        *("--nnodes", "2", "--node_rank", "1"),
        *("--master_addr", "10.0.0.1", "--master_port", "29500"),
    ]
    with pytest.raises(ConfigError, match="NNODES=2 without NODE_RANK and MASTER_ADDR"):
        command(TWO, {"NNODES": "2"})
    with pytest.raises(ConfigError, match="NNODES=two"):
        command(TWO, {"NNODES": "two"})


@pytest.mark.parametrize(
    ("names", "environment", "expected"),
    [
        (("NVIDIA GeForce RTX 4090",) * 2, {}, NCCL_OFF),
        (("NVIDIA GeForce RTX 3090",) * 2, {}, NCCL_OFF),
        (("NVIDIA GeForce RTX 4080 SUPER",) * 2, {"NCCL_P2P_DISABLE": "0"}, {"NCCL_IB_DISABLE": "1"}),
        (("NVIDIA GeForce RTX 4090",), {}, {}),
        (("NVIDIA H200",) * 2, {}, {}),
    ],
)
def test_boards_without_peer_to_peer_get_nccl_s_settings(
    names: tuple[str, ...], environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert nccl_settings(Machine(names), environment) == expected


def fake_proc(folder: Path, pid: int, command: str, device: str) -> Path:
    process = folder / str(pid)
    (process / "fd").mkdir(parents=True)
    (process / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    (process / "fd" / "7").symlink_to(device)
    return folder


def test_who_holds_a_gpu_is_read_from_proc(tmp_path: Path) -> None:
    fake_proc(tmp_path, 41, "python -m server.engine", "/dev/nvidia0")
    fake_proc(tmp_path, 42, "python -m other", "/dev/nvidiactl")
    (holder,) = gpu_holders(tmp_path)
    assert (holder.pid, holder.is_engine) == (41, True)


def test_a_gpu_held_by_the_engine_is_exit_6_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_proc(tmp_path, 41, "python -m server.engine", "/dev/nvidia0")
    monkeypatch.setattr("trainer.launch.gpu_holders", lambda: gpu_holders(tmp_path))
    with pytest.raises(DoesNotFit, match=r"H200.*process 41.*stop the server first.*CUDA_VISIBLE_DEVICES") as caught:
        check_gpus_free(Machine(("NVIDIA H200",)))
    assert caught.value.exit_code == 6
    check_gpus_free(CPU)


def test_an_engine_on_another_gpu_is_in_nobody_s_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_proc(tmp_path, 41, "python -m server.engine", "/dev/nvidia0")
    (tmp_path / "41" / "environ").write_text("HOME=/\0CUDA_VISIBLE_DEVICES=0,2\0X=1\0")
    monkeypatch.setattr("trainer.launch.gpu_holders", lambda: gpu_holders(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    check_gpus_free(Machine(("NVIDIA H200",)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 2")
    with pytest.raises(DoesNotFit):
        check_gpus_free(Machine(("NVIDIA H200",)))


def test_gpus_are_counted_without_torch(tmp_path: Path) -> None:
    proc, dev = tmp_path / "proc", tmp_path / "dev"
    dev.mkdir()
    for number in (0, 1):
        (dev / f"nvidia{number}").touch()
        folder = proc / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t NVIDIA GeForce RTX 4090\nIRQ: 1\n")
    (dev / "nvidiactl").touch()
    assert gpu_names(proc, dev) == ("NVIDIA GeForce RTX 4090",) * 2
    assert gpu_names(tmp_path / "none", dev) == ("NVIDIA GPU",) * 2
    assert gpu_names(tmp_path / "none", tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("code", "told", "expected"),
    [(0, [], 0), (1, [5, 143], 5), (1, [143, 4], 4), (1, [143, 143], 143), (1, [], 1), (-9, [], 137), (1, [3, 3], 3)],
)
def test_the_exit_code_and_the_message_are_those_of_the_rank_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, told: list[int], expected: int
) -> None:
    file = tmp_path / "ends"
    if told:
        file.write_text("".join(json.dumps([number, f"for {number}"]) + "\n" for number in told))
    assert _ended(code, file) == expected
    assert capsys.readouterr().err == (f"error: for {expected}\n" if told else "")


def test_missing_packages_are_named_together() -> None:
    options = {"report_to": ("no_such_board",), "deepspeed": "zero1", "quantization_bit": None}
    with pytest.raises(ConfigError, match="report_to=no_such_board: the package no_such_board is not installed; pip"):
        check_packages(TrainConfig(model_name_or_path="m", train_file=("d",), **options))


def test_a_missing_extra_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launch.find_spec", lambda name: None)
    options = {"stage": "dpo", "deepspeed": "zero1", "finetuning_type": "qlora", "report_to": ("tensorboard",)}
    with pytest.raises(ConfigFaults) as caught:
        check_packages(TrainConfig(model_name_or_path="m", train_file=("d",), **options))
    extras = [re.search(r"pip install 'qloop\[(\w+)\]'", fault) for fault in caught.value.faults]
    assert [found and found[1] for found in extras] == ["preference", "deepspeed", "bnb", "tensorboard"]


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_zero_stages_by_name(name: str) -> None:
    made = deepspeed_config(name)
    zero = made["zero_optimization"]
    assert zero["stage"] == int(name[4]) and made["train_batch_size"] == "auto"
    assert ("offload_optimizer" in zero) == name.endswith("offload")
    assert ("offload_param" in zero) == (name == "zero3_offload")


RANK = """
import os, signal, sys, time
from pathlib import Path
from trainer.launch import end
def stopped(number, frame):
    sys.exit(end(143, "stopped"))
signal.signal(signal.SIGTERM, stopped)
Path(sys.argv[1], os.environ["RANK"]).touch()
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    time.sleep(0.05)
"""
PARENT = """
import sys
from trainer import launch
head = [sys.executable, "-m", "trainer.agent", "--nproc_per_node", "2", "--standalone"]
sys.exit(launch._run([*head, sys.argv[1], sys.argv[2]], {}))
"""


@pytest.mark.slow
def test_a_stop_reaches_the_ranks_and_their_exit_code_comes_back(tmp_path: Path) -> None:
    script, marks = tmp_path / "rank.py", tmp_path / "marks"
    script.write_text(RANK)
    marks.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(script), str(marks)], env=environment, cwd=ROOT)
    try:
        deadline = time.monotonic() + 90
        while len(list(marks.iterdir())) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 143
    finally:
        parent.kill()


@pytest.mark.slow
def test_two_ranks_that_fail_give_one_line_and_their_exit_code(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("{bad\n")
    words = [f"model={tiny_model}", f"data={data}", "max_length=256", "num_processes=2", "run_id=r"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", *words, "--home", str(tmp_path / "home")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "bad-json" in errors[0]
    assert "Traceback" not in done.stderr
