"""Every error that ends a command of the trainer, with its exit code.

    server.errors.ConfigError    2  a file, an option or a name that cannot be used
    └── ConfigFaults             2  several of them at once
    TrainerError                 1  the run failed
    ├── DataError                3  too few usable rows, or too many refused ones
    ├── DriftError               4  a checkpoint that belongs to other data, another base or other settings
    ├── Diverged                 5  loss or gradient is no longer a number
    ├── DoesNotFit               6  the memory that it needs is not there, or another process holds the device
    ├── GateRefused              7  the name was not moved: what was measured is not good enough
    ├── NotServable              8  what was trained differs from what would be served
    └── Stopped                143  asked to stop; a checkpoint was saved first

One line each: what, where, why, and how to mend it.
"""

from collections.abc import Sequence
from typing import ClassVar

from server.errors import ConfigError

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130


class ConfigFaults(ConfigError):
    """All faults of one configuration; `faults` has one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class TrainerError(Exception):
    """A command that could not do its work."""

    exit_code: ClassVar[int] = 1


class DataError(TrainerError):
    exit_code = 3


class DriftError(TrainerError):
    exit_code = 4


class Diverged(TrainerError):
    exit_code = 5


class DoesNotFit(TrainerError):
    exit_code = 6


def is_memory_fault(error: BaseException) -> bool:
    """Whether main memory or a GPU's ran out; torch says so on a CPU with a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def does_not_fit(error: BaseException) -> DoesNotFit:
    """What to do about a memory fault."""
    return DoesNotFit(
        f"memory ran out ({first_line(error)}): lower per_device_train_batch_size or max_length, set "
        "gradient_checkpointing=true, train with lora or qlora, or divide the model with deepspeed=zero3"
    )


class GateRefused(TrainerError):
    exit_code = 7


class NotServable(TrainerError):
    exit_code = 8


class Stopped(TrainerError):
    exit_code = 143


def first_line(error: BaseException) -> str:
    """What a library's error says first, for a message of one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
