"""Before weights are loaded: refuse a run that cannot fit, with what would.

An estimate is not a promise, so only a clear miss is refused: 85 % of the estimate is more than there is.
"""

from collections.abc import Sequence
from pathlib import Path

from server.errors import ConfigError
from trainer.config import TrainConfig
from trainer.errors import DoesNotFit
from trainer.estimate.reserve import GIB, process_bytes
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows
from trainer.estimate.training import Device
from trainer.estimate.verdict import Cure, TrainingEstimate, estimate_training, find_cure

SURE = 0.85


def check_fits(config: TrainConfig, base: Path, lengths: Sequence[int], room: Room | None = None) -> None:
    """Raises DoesNotFit; says nothing where the memory or the architecture is not known.

    `lengths`: tokens of the rows, in the run's order. `room`: what is free now; else this machine is asked.
    """
    if not config.memory_check:
        return
    import torch

    room = room or _room()
    if room.device <= 0:
        return
    process = process_bytes()
    device = Device(on_cpu=room.on_cpu, has_bf16=not room.on_cpu and torch.cuda.is_bf16_supported(), process=process)
    rows = Rows(tuple(lengths))
    try:
        found = estimate_training(config, base, room, rows, device)
    except ConfigError:
        return  # training will say what is wrong
    # What this process has already is no longer among what is free.
    needed = found.bytes - (process if room.on_cpu else 0)
    if SURE * needed > room.device or (found.chosen and SURE * found.chosen.host > room.host):
        raise DoesNotFit(refusal(found, find_cure(found, base, rows, device)))


def refusal(found: TrainingEstimate, cure: Cure | None) -> str:
    """One line: how much it needs, how much there is, and the first rung or the smallest change that fits."""
    needed = f"about {found.bytes / GIB:.1f} GiB are needed, {found.room.device / GIB:.1f} GiB are free"
    if found.chosen and found.chosen.device <= found.room.device:
        needed = (
            f"about {found.chosen.host / GIB:.1f} GiB of main memory are needed beside the GPUs, "
            f"{found.room.host / GIB:.1f} GiB are free"
        )
    if found.first_fit:
        advice = (
            f"deepspeed={found.first_fit.name} is the first rung that fits ({found.first_fit.device / GIB:.1f} GiB)"
        )
    elif cure:
        advice = f"it fits with {cure} ({cure.bytes / GIB:.1f} GiB)"
    else:
        advice = "no setting of ours makes it fit: take a smaller model or more memory"
    return (
        f"this run will not fit: {needed} on {found.room.name}; {advice}. "
        "`python -m trainer estimate` shows every part; memory_check=false tries anyway"
    )


def _room() -> Room:
    import torch

    from trainer.estimate.room import this_machine
    from trainer.machine import find_machine

    machine = find_machine()
    if not machine.num_gpus or not torch.cuda.is_available():
        from trainer.machine import Machine

        return this_machine(Machine())
    free = min(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    known = this_machine(machine)
    return Room(_world(torch.cuda.device_count()), int(free), known.host, known.name)


def _world(devices: int) -> int:
    import torch.distributed as group

    return group.get_world_size() if group.is_available() and group.is_initialized() else devices
