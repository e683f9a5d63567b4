"""How often each row is taken: some rows at random, or labels evened out so that the long tail is heard.

Knows counts and labels; knows no files.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from server.errors import ConfigError


def sample_rows(num_rows: int, wanted: int, seed: int) -> Counter[int]:
    """`wanted` different rows, each equally likely. Raises ConfigError when there are fewer."""
    if wanted > num_rows:
        raise ConfigError(f"{wanted} rows are wanted, there are {num_rows}; --balance FIELD may repeat rows")
    return Counter(random.Random(seed).sample(range(num_rows), wanted))


def balanced_counts(counts: Mapping[str, int], wanted: int, temperature: float, max_repeat: int) -> dict[str, int]:
    """Rows per label, in proportion to count ** (1 / temperature): 1 keeps the shares, a high one makes them equal.

    The sampling of multilingual BERT and XLM-R (Conneau et al. 2020, section 3.1). No row is taken more than
    `max_repeat` times; what a label cannot give for that goes to the others. Raises ConfigError when all together
    cannot give `wanted` rows.
    """
    if wanted > max_repeat * sum(counts.values()):
        raise ConfigError(
            f"{wanted} rows are wanted, {sum(counts.values())} rows taken at most {max_repeat} times are fewer; "
            "raise --max-repeat or ask for less"
        )
    quotas = dict.fromkeys(counts, 0)
    open_labels = set(counts)
    while missing := wanted - sum(quotas.values()):
        weights = {label: counts[label] ** (1 / temperature) for label in sorted(open_labels)}
        for label, extra in _shares(weights, missing).items():
            quotas[label] = min(quotas[label] + extra, max_repeat * counts[label])
        open_labels = {label for label in open_labels if quotas[label] < max_repeat * counts[label]}
    return quotas


def sample_balanced(labels: Sequence[str], wanted: int, temperature: float, max_repeat: int, seed: int) -> Counter[int]:
    """Row numbers with how often each is taken: every row of a label equally often, give or take one."""
    rows: dict[str, list[int]] = defaultdict(list)
    for number, label in enumerate(labels):
        rows[label].append(number)
    quotas = balanced_counts({label: len(r) for label, r in rows.items()}, wanted, temperature, max_repeat)
    draw = random.Random(seed)
    taken: Counter[int] = Counter()
    for label in sorted(rows):
        times, rest = divmod(quotas[label], len(rows[label]))
        for number in rows[label] if times else ():
            taken[number] += times
        taken.update(draw.sample(rows[label], rest))
    return taken


def _shares(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the weights that add up to `total`: largest remainder."""
    scale = total / sum(weights.values())
    shares = {label: int(weight * scale) for label, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda label: (shares[label] - weights[label] * scale, label))
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares
