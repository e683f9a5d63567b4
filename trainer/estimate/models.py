"""The models of a run whose shapes must be read: the one that is trained, and ppo's reward model."""

from dataclasses import dataclass

from trainer.estimate.shape import ModelShape
from trainer.estimate.weights import BYTES, SAVED_FORMATS, weight_bytes


@dataclass(frozen=True)
class RewardModel:
    """A language model that has one score instead of its output layer. `adapter`: bytes of the one above it."""

    shape: ModelShape
    adapter: int = 0

    def bytes_in(self, number: str) -> int:
        """`number`: the format it is loaded in, unless its folder is saved in 4 or 8 bits."""
        shape = self.shape
        language = weight_bytes(shape, SAVED_FORMATS.get(shape.saved_bits, number), kept=number)
        head = 0 if shape.is_tied else shape.num_embedding
        return language + (shape.hidden - head) * BYTES[number] + self.adapter


@dataclass(frozen=True)
class Models:
    """`reward`: of stage ppo. `unknown`: why there is none although the run needs one."""

    shape: ModelShape
    reward: RewardModel | None = None
    unknown: str = ""
