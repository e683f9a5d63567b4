"""Before weights are loaded: refuse a run that cannot fit, with what would.

An estimate is not a promise, so only a clear miss is refused: 85 % of the estimate is more than there is.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from server.store.home import Home
from trainer.config import TrainConfig
from trainer.errors import DoesNotFit, first_line
from trainer.estimate.reserve import GIB, process_bytes
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows
from trainer.estimate.training import Device
from trainer.estimate.verdict import Cure, TrainingEstimate, estimate_training, find_cure, read_models

log = logging.getLogger("qloop.estimate")
SURE = 0.85


def check_fits(
    config: TrainConfig, base: Path, lengths: Sequence[int], room: Room | None = None, home: Home | None = None
) -> None:
    """Raises DoesNotFit; says nothing where the memory, the architecture or another part of the run is not known.

    `lengths`: tokens of the rows, in the run's order. `room`: what is free now; else this machine is asked. `home`:
    where a reward model's run lies; else the environment's.
    """
    if not config.memory_check:
        return
    rows = Rows(tuple(lengths))
    try:
        room = room or _room()
        if room.device <= 0:
            return
        device = _device(room)
        found = estimate_training(config, base, room, rows, device, read_models(config, base, home))
    except Exception as error:
        # The check is a courtesy. An architecture with code of its own can surprise the estimate in ways that nobody
        # lists, and its run may be a good one; what is wrong with the run itself, training will say.
        _note(error)
        return
    if _surely_misses(found, device):
        raise DoesNotFit(refusal(found, _cure(found, base, rows, device)))


def refusal(found: TrainingEstimate, cure: Cure | None) -> str:
    """One line: how much it needs, how much there is, and the first rung or the smallest change that fits."""
    needed = f"about {found.least_bytes / GIB:.1f} GiB are needed, {found.room.device / GIB:.1f} GiB are free"
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


def _surely_misses(found: TrainingEstimate, device: Device) -> bool:
    room = found.room
    if found.not_judged:
        return False
    # What this process has already is no longer among what is free.
    needed = found.least_bytes - (device.process if room.on_cpu else 0)
    return SURE * needed > room.device or (found.chosen is not None and SURE * found.chosen.host > room.host)


def _cure(found: TrainingEstimate, base: Path, rows: Rows, device: Device) -> Cure | None:
    """None, too, where a cure cannot be estimated: the refusal stands without it."""
    try:
        return find_cure(found, base, rows, device)
    except Exception as error:
        _note(error)
        return None


def _note(error: Exception) -> None:
    log.info("the memory check could not estimate: %s: %s", type(error).__name__, first_line(error))


def _device(room: Room) -> Device:
    from trainer.options.arguments import gpu_has_bf16

    return Device(room.on_cpu, not room.on_cpu and gpu_has_bf16(), process_bytes())


def _room() -> Room:
    own = _own_room()
    return replace(own, device=_least(own.device), host=_least(own.host))


def _own_room() -> Room:
    """This rank's own GPU; to ask for another would make a CUDA context on it, beside the rank that trains there."""
    import torch

    from trainer.estimate.room import this_machine
    from trainer.machine import Machine, find_machine

    machine = find_machine()
    if not machine.num_gpus or not torch.cuda.is_available():
        return this_machine(Machine())
    known = this_machine(machine)
    world = _world(torch.cuda.device_count())
    return Room(world, torch.cuda.mem_get_info()[0], known.host, known.name, _machines())


def _world(devices: int) -> int:
    import torch.distributed as group

    return group.get_world_size() if group.is_available() and group.is_initialized() else devices


def _least(free: int) -> int:
    """Of all ranks: they refuse together or not at all, or the others would wait for the one that did."""
    import torch.distributed as group

    if not (group.is_available() and group.is_initialized()):
        return free
    found: list[int] = [free] * group.get_world_size()
    group.all_gather_object(found, free)
    return min(found)


def _machines() -> int:
    """torchrun tells every rank how many ranks there are, and how many of them on its own machine."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
