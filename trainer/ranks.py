"""What the processes of one run agree on. With a single process each function is its plain meaning."""

from collections.abc import Callable
from typing import Any, TypeVar

from server.errors import ConfigError
from trainer.errors import TrainerError

T = TypeVar("T")


def rank() -> int:
    """This process' number among those of the run; 0 writes the run folder."""
    group = _group()
    return group.get_rank() if group else 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    group = _group()
    if group:
        group.barrier()


def first_decides(decide: Callable[[], T]) -> T:
    """Call `decide` in the first process only; every process gets its result, or its ConfigError or TrainerError."""
    group = _group()
    if not group:
        return decide()
    box: list[Any] = [None, None]
    if group.get_rank() == 0:
        try:
            box[0] = decide()
        except (ConfigError, TrainerError) as error:
            box[1] = error
    group.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def any_rank(flag: bool, device: Any) -> bool:
    """Whether the flag is set in any process; all of them must ask at the same step."""
    group = _group()
    if not group:
        return flag
    import torch

    found = torch.tensor(int(flag), device=device)
    group.all_reduce(found, op=group.ReduceOp.MAX)
    return bool(found.item())


def gathered(trainer: Any) -> Any:
    """All weights where they lie on several ranks (FSDP2, ZeRO), else None. Every process takes part."""
    is_split = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_split else None


def _group() -> Any:
    import torch.distributed as group

    return group if group.is_available() and group.is_initialized() else None
