"""What this machine has, found out without torch: GPUs from the driver's files, and who holds them.

Reads /proc, so on anything but Linux there are no GPUs.
"""

import ctypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PROC = Path("/proc")
DEV = Path("/dev")
ENGINE_MARK = "server.engine"  # python -m server.engine
M_MMAP_THRESHOLD = -3  # of mallopt(3)
RETURNED_BLOCK = 256 << 10  # bytes; tensors of this size and more are given back when they are freed
# Consumer boards whose drivers lack peer-to-peer: NCCL must be told, or several GPUs hang or stop at the start.
NO_P2P = re.compile(r"RTX\s*(3090|40\d0)", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """`gpus`: names of the GPUs that torch will see."""

    gpus: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        return len(self.gpus)

    @property
    def lacks_p2p(self) -> bool:
        return any(NO_P2P.search(name) for name in self.gpus)


@dataclass(frozen=True)
class Holder:
    """A process that has a GPU open."""

    pid: int
    command: str
    visible: str | None = None  # its CUDA_VISIBLE_DEVICES

    @property
    def is_engine(self) -> bool:
        return ENGINE_MARK in self.command

    def shares_gpus(self, visible: str | None) -> bool:
        """Whether a process with this CUDA_VISIBLE_DEVICES may meet it; without such a choice it sees them all."""
        if visible is None or self.visible is None:
            return True
        return not _words(visible).isdisjoint(_words(self.visible))


def find_machine() -> Machine:
    """The GPUs of this machine, those that CUDA_VISIBLE_DEVICES leaves, if the installed torch can use them."""
    names = gpu_names()
    if not names or not torch_has_cuda():
        return Machine()
    return Machine(_visible(names, os.environ.get("CUDA_VISIBLE_DEVICES")))


def num_cores() -> int:
    """Cores that this process may use; all of them where the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def return_freed_memory() -> None:
    """Let glibc give every large block back to the system when it is freed; a choice in the environment wins.

    It would keep blocks below 32 MiB, and cannot put an aligned block of the same size into the gap of a freed one
    (glibc before 2.38): LoRA with gradient checkpointing on a 0.5B model grew by 1.2 GiB for 0.2 GiB of live tensors.
    No cost in CPU time could be told from noise; on a busy machine a step took about a tenth longer. Does nothing
    without glibc.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, RETURNED_BLOCK)


def gpu_names(proc: Path = PROC, dev: Path = DEV) -> tuple[str, ...]:
    """Names in the driver's order; where a container hides them, the device files are counted."""
    found = []
    for file in sorted(proc.glob("driver/nvidia/gpus/*/information")):
        named = re.search(r"Model:\s*(.+)", _read(file))
        found.append(named[1].strip() if named else "NVIDIA GPU")
    devices = [path for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return tuple(found[: len(devices)]) if found else ("NVIDIA GPU",) * len(devices)


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, seen by its libraries."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return any((Path(spec.origin).parent / "lib").glob("libtorch_cuda*.so"))


def gpu_holders(proc: Path = PROC) -> list[Holder]:
    """Processes of this user (all, for root) with a GPU's device file open; this process is left out."""
    holders = []
    for folder in proc.glob("[0-9]*"):
        if int(folder.name) == os.getpid() or not _has_gpu_open(folder):
            continue
        command = _read(folder / "cmdline").replace("\0", " ").strip()
        chosen = re.search(r"(?:^|\0)CUDA_VISIBLE_DEVICES=([^\0]*)", _read(folder / "environ"))
        holders.append(Holder(int(folder.name), command, chosen[1] if chosen else None))
    return sorted(holders, key=lambda holder: holder.pid)


def _words(choice: str) -> set[str]:
    return {part.strip() for part in choice.split(",")}


def _has_gpu_open(folder: Path) -> bool:
    return any(re.fullmatch(r"/dev/nvidia\d+", target) for target in _links(folder / "fd"))


def _links(folder: Path) -> Iterable[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(folder / name)
        except OSError:
            continue


def _visible(names: tuple[str, ...], choice: str | None) -> tuple[str, ...]:
    """CUDA's rule: an empty or negative entry ends the list. A UUID counts as one GPU."""
    if choice is None:
        return names
    kept: list[str] = []
    for part in choice.split(","):
        word = part.strip()
        if word.isdigit() and int(word) < len(names):
            kept.append(names[int(word)])
        elif word.startswith(("GPU-", "MIG-")):
            kept.append(names[0])
        else:
            break
    return tuple(kept)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
