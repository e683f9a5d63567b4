"""The memory that a run may use: the GPUs that were named, those of this machine, or its main memory."""

import re
from dataclasses import dataclass

from server.errors import ConfigError
from trainer.doctor import smi_lines
from trainer.estimate.reserve import GIB, available_memory
from trainer.machine import Machine

_GPUS = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(\d+(?:\.\d+)?)\s*(g|gb|gib)?", re.IGNORECASE)


@dataclass(frozen=True)
class Room:
    """`num_gpus` of `device` bytes each, or a CPU with `device` bytes; `host`: main memory beside the GPUs.

    The GPUs are those of all `num_machines` together, `host` is one machine's.
    """

    num_gpus: int
    device: int
    host: int
    name: str
    num_machines: int = 1

    @property
    def on_cpu(self) -> bool:
        return self.num_gpus == 0

    @property
    def all_devices(self) -> int:
        """Bytes of all GPUs together, over which a server divides its weights and its KV cache."""
        return self.device * max(1, self.num_gpus)


def named_gpus(text: str) -> Room:
    """`2x24GB`, `80GB`. A card that is sold as 24 GB has 24 GiB. Raises ConfigError."""
    found = _GPUS.fullmatch(text.strip())
    count = int(found[1] or 1) if found else 0
    size = round(float(found[2]) * GIB) if found else 0
    if not count or not size:
        raise ConfigError(f"--gpus {text}: a number and a size are expected, for example 2x24GB")
    return Room(count, size, available_memory(), f"{count} x {size / GIB:g} GiB GPU")


def this_machine(machine: Machine) -> Room:
    """What is free now. GPUs are asked through nvidia-smi; where it does not answer, Room.device is 0: not known."""
    host = available_memory()
    if not machine.num_gpus:
        return Room(0, host, host, "this machine's main memory")
    free = [int(number) for line in smi_lines("memory.free") for number in re.findall(r"\d+", line)[:1]]
    least = min(free[: machine.num_gpus], default=0) * 2**20
    return Room(machine.num_gpus, least, host, f"this machine's {machine.num_gpus} x {machine.gpus[0]}")
