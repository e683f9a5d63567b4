"""What is known of a metric by its name: which way is better, and how a reader wants to see it."""

from dataclasses import dataclass
from typing import Literal

from trainer.compare.comparison import Change

Scale = Literal["share", "nat", "plain"]
# Smaller is better.
FALLING = ("perplexity", "bits_per_byte", "loss")
# More of it is neither good nor bad.
NEUTRAL = ("length", "num_", "tokens", "chars", "seconds", "position")
# Log-probabilities, in nat.
NATS = ("log_likelihood", "logprob", "log_prob", "nll", "gap")


@dataclass(frozen=True)
class Metric:
    """`direction`: 1 where more is better, -1 where less is, 0 where it only describes."""

    name: str
    direction: int
    scale: Scale

    def show(self, value: float) -> str:
        """`0.4312` of a share is `43.1`: percent."""
        if self.scale == "share":
            return f"{100 * value:.1f}"
        if abs(value) >= 100:
            return f"{value:,.0f}"
        return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"

    def show_difference(self, value: float) -> str:
        text = self.show(value)
        return text if text.startswith("-") else f"+{text}"

    def show_interval(self, interval: Change) -> str:
        return f"{self.show_difference(interval.low)} … {self.show_difference(interval.high)}"


def metric_of(name: str) -> Metric:
    """Unknown names are shares, of which more is better: most are."""
    lowered = name.lower()
    if any(word in lowered for word in NATS):
        return Metric(name, -1 if "nll" in lowered else 1, "nat")
    if any(word in lowered for word in FALLING):
        return Metric(name, -1, "plain")
    if any(word in lowered for word in NEUTRAL):
        return Metric(name, 0, "plain")
    return Metric(name, 1, "share")
