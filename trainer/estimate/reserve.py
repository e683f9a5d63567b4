"""What cannot be counted from shapes: the interpreter, the libraries and the device's own memory. Constants.

Each says where it is from. A CPU run takes the size of its own process as it stands, so only what comes later is
a constant there.
"""

import re
from pathlib import Path

MIB, GIB = 2**20, 2**30
# Interpreter, torch, transformers, peft and the trainer imported, Qwen2's tokenizer read: torch 2.13 (CPU build),
# transformers 5.19, Python 3.11 on x86-64 Linux.
CPU_PROCESS = 540 * MIB
# What the loop adds to it on its first steps, 50 to 90 MiB in traces: compiled matrix kernels, accelerate, data loader,
# thread stacks.
CPU_LATER = 90 * MIB
# Stages dpo and rm import TRL, which reads datasets and pyarrow. A guess.
CPU_TRL = 130 * MIB
# A CUDA context with cuBLAS's workspace, seen from outside torch; NVIDIA's documents give no figure.
CUDA_CONTEXT = 600 * MIB
# torch's caching allocator keeps blocks of 2 to 20 MiB whole (torch.cuda memory notes): of all that it hands out.
CUDA_FRAGMENTS = 0.03


def process_bytes() -> int:
    """Resident size of this process; 0 where the system does not tell."""
    found = re.search(r"VmRSS:\s*(\d+) kB", _read(Path("/proc/self/status")))
    return int(found[1]) * 1024 if found else 0


def available_memory() -> int:
    """Main memory that this process may still take: the machine's, or less where a cgroup says so; 0: not known."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")))
    machine = int(found[1]) * 1024 if found else 0
    most = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
    if most.isdigit() and used.isdigit():
        return max(0, min(machine, int(most) - int(used) + _reclaimable()))
    return machine


def _reclaimable() -> int:
    """File pages of this cgroup, which the kernel gives up when memory is short."""
    text = _read(Path("/sys/fs/cgroup/memory.stat"))
    return sum(int(number) for number in re.findall(r"^(?:inactive_file|active_file) (\d+)$", text, re.M))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
