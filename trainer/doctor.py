"""What this machine has and what can train on it. Reads versions and files; imports neither torch nor transformers."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from server.store.home import Home
from trainer.machine import Machine, find_machine, gpu_holders, gpu_names, num_cores, torch_has_cuda

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "deepspeed", "vllm"),
    *("liger-kernel", "matplotlib", "tensorboard"),
)
CPU_FEATURES = {
    "avx2": "int8 and nf4 base models",
    "avx512f": "faster fp32",
    "avx512_bf16": "bf16 without emulation",
    "amx_bf16": "fast bf16",
}
MODELS = {"0.5B": 0.49e9, "1.5B": 1.54e9, "7B": 7.62e9, "14B": 14.8e9, "32B": 32.8e9, "72B": 72.7e9}
# Bytes per parameter while training, without activations: AdamW keeps fp32 weights, gradients and two moments (16);
# a frozen base stands in bf16 (2) or nf4 (0.6), and an adapter of rank 16 adds a few percent.
WAYS = {"full": 16.0, "LoRA, bf16 base": 2.2, "QLoRA, nf4 base": 0.75}
CPU_WAYS = {"full, fp32": 16.0, "LoRA, fp32 base": 4.2, "LoRA, bf16 base": 2.2, "QLoRA, nf4 base": 0.75}
HEADROOM = 0.8  # the rest is for activations and the framework
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """`free` and `total` in bytes."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free"


def examine(home: Home) -> Iterator[str]:
    """Lines to print."""
    machine = find_machine()
    yield "packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield from _cpu()
    ram = _ram()
    yield f"memory: {ram}"
    yield from _gpus(machine)
    yield from _holders()
    yield _disk(home)
    yield from _what_can_train(machine, ram)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _cpu() -> Iterator[str]:
    text = _read(Path("/proc/cpuinfo"))
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.search(r"flags\s*:\s*(.+)", text)[1].split()) if re.search(r"flags\s*:\s*(.+)", text) else set()  # type: ignore[index]
    yield f"CPU: {name[1].strip() if name else 'unknown'}, {num_cores()} cores to use"
    yield "CPU features: " + ", ".join(
        f"{feature} {'yes' if feature in flags else 'no'} ({use})" for feature, use in CPU_FEATURES.items()
    )


def _gpus(machine: Machine) -> Iterator[str]:
    names = gpu_names()
    if not names:
        yield "GPU: none"
        return
    if not torch_has_cuda():
        yield f"GPU: {len(names)} found, but the installed torch is a CPU build; install the CUDA build of it"
        return
    for line in smi_lines("index,name,memory.free,memory.total") or list(names):
        yield f"GPU: {line}"
    if len(names) != machine.num_gpus:
        yield f"GPU: CUDA_VISIBLE_DEVICES leaves {machine.num_gpus} of {len(names)}"
    if machine.lacks_p2p and machine.num_gpus > 1:
        yield "NCCL: these boards have no peer-to-peer; train sets NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 by itself"
    elif machine.num_gpus > 1:
        yield "NCCL: nothing to set"


def _holders() -> Iterator[str]:
    for holder in gpu_holders():
        who = "the engine" if holder.is_engine else f"`{holder.command[:60]}`"
        cure = "; stop the server before training on it" if holder.is_engine else ""
        yield f"GPU in use: by {who}, process {holder.pid}{cure}"


def _disk(home: Home) -> str:
    place = next(path for path in (home.path, *home.path.parents) if path.exists())
    usage = shutil.disk_usage(place)
    return f"disk: {Memory(usage.free, usage.total)} in {home.path}"


def _what_can_train(machine: Machine, ram: Memory) -> Iterator[str]:
    """By weights, gradients and optimizer; long rows and large batches need more."""
    device = _gpu_memory() if machine.num_gpus else None
    room = device or ram
    place = f"one GPU ({device.total / GIB:.0f} GiB)" if device else "the CPU"
    for way, size in (WAYS if device else CPU_WAYS).items():
        fitting = [name for name, parameters in MODELS.items() if parameters * size <= room.free * HEADROOM]
        yield f"on {place}, {way}: " + (f"up to {fitting[-1]}" if fitting else "not even 0.5B")
    if machine.num_gpus > 1:
        yield f"on {machine.num_gpus} GPUs: deepspeed=zero3 or fsdp=fsdp2 divide these needs by {machine.num_gpus}"


def _gpu_memory() -> Memory | None:
    for line in smi_lines("memory.free,memory.total"):
        numbers = re.findall(r"\d+", line)
        if len(numbers) == 2:
            return Memory(int(numbers[0]) * 2**20, int(numbers[1]) * 2**20)
    return None


def smi_lines(fields: str) -> list[str]:
    """Lines of nvidia-smi; empty where it is missing or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _ram() -> Memory:
    text = _read(Path("/proc/meminfo"))

    def value(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+) kB", text)
        return int(found[1]) * 1024 if found else 0

    return Memory(value("MemAvailable"), value("MemTotal"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
