"""How probable a model finds texts, from the sums of their tokens' log-probabilities. Knows no model."""

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

_LARGEST: Final = 700.0  # nats per token: e^709 is the largest float


def bits_per_byte(nats: float, text: str) -> float:
    """Of a text whose log-probability is `nats`, in UTF-8: what compares models that have different tokenizers. Raises
    ValueError for an empty text."""
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if not num_bytes:
        raise ValueError("an empty text has no bits per byte")
    return -nats / num_bytes / math.log(2)


def perplexities(sums: "Floats") -> "Floats":
    """[sets, 2] sums of nats and of tokens to [sets] perplexities exp(-nats / tokens): each token weighs alike. Never
    infinite: at most e^700."""
    import numpy as np

    return np.exp(np.minimum(-sums[:, 0] / sums[:, 1], _LARGEST))
