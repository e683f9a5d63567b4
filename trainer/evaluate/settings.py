"""How an evaluation is made: what decides its figures, beside candidate and items."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from server.errors import ConfigError

HOTTEST = 2.0  # OpenAI's bound


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """`by`: letters of single-answer questions by their probability, or by the answer that is written. `style`: chat
    template or plain text; auto is chat where the candidate has a template. `limit`: items of each task.

    Raises ConfigError for a number that is out of bounds."""

    shots: int = 0
    by: Literal["logprob", "answer"] = "logprob"
    style: Literal["auto", "chat", "plain"] = "auto"
    shuffle: bool = False
    limit: int | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    system: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 1), ("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: {value} is too small; {least} or more is expected")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= HOTTEST):
            raise ConfigError(f"temperature: {self.temperature:g} is out of bounds; 0 to {HOTTEST:g} is expected")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
