"""What DeepSpeed is told to divide and to move off the GPU: by one of the names of the ladder, or by a user's file.

Read from the dictionary that DeepSpeed gets, so a name and a file that say the same are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigError
from trainer.options.zero import deepspeed_config

STAGES = (0, 1, 2, 3)
PLACES = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class ZeroPlan:
    """ZeRO's stage; `states` and `weights`: where optimizer states and weights are moved to, one of PLACES."""

    stage: int
    states: str = "none"
    weights: str = "none"

    @property
    def name(self) -> str:
        """The ladder's."""
        return f"zero{self.stage}" + ("_offload" if self.offloads else "")

    @property
    def offloads(self) -> bool:
        return (self.states, self.weights) != ("none", "none")

    @property
    def uses_nvme(self) -> bool:
        return "nvme" in (self.states, self.weights)


def zero_plan(name: str) -> ZeroPlan:
    """Of a rung's name or a JSON file. Raises ConfigError, with the key, for what DeepSpeed does not know either."""
    zero = deepspeed_config(name).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else zero
    if isinstance(stage, bool) or stage not in STAGES:
        raise ConfigError(f"deepspeed={name}: zero_optimization: stage={stage!r}: 0, 1, 2 or 3 is expected")
    # DeepSpeed divides nothing in stage 0 and moves weights in stage 3 only, whatever else the file says.
    states = _place(name, zero, "offload_optimizer", "cpu_offload") if stage else "none"
    weights = _place(name, zero, "offload_param", "cpu_offload_param") if stage == 3 else "none"
    return ZeroPlan(int(stage), states, weights)


def _place(name: str, zero: Mapping[str, Any], key: str, old: str) -> str:
    """`old`: what the key was called before; DeepSpeed still reads it."""
    told = zero.get(key) or {"device": "cpu" if zero.get(old) else "none"}
    if not isinstance(told, Mapping) or told.get("device", "none") not in PLACES:
        raise ConfigError(f'deepspeed={name}: {key}={told}: {{"device": ...}} is expected, with {", ".join(PLACES)}')
    return str(told.get("device", "none"))
