"""Rows in, repaired rows out, without those a rule refuses. Knows rules and repairs; knows no files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from server.errors import ConfigError
from trainer.data.repairs import REPAIRS, Repair, repaired
from trainer.data.rows import LedgerLine, Note, Row
from trainer.data.rules import RULES, Rule


@dataclass(frozen=True)
class Cleaner:
    """Repairs first, then rules in their order: a row is dropped under the first rule that refuses it."""

    rules: tuple[tuple[Rule, float], ...]  # with the limit that holds
    repairs: tuple[Repair, ...]

    @classmethod
    def chosen(
        cls, on: Sequence[str] = (), off: Sequence[str] = (), limits: Mapping[str, float] | None = None
    ) -> "Cleaner":
        """The default rules and repairs, changed by name; a limit turns its rule on. Raises ConfigError."""
        limits = limits or {}
        known = {rule.name: rule for rule in RULES}
        for name in (*on, *off, *limits):
            if name not in known and (name in limits or name not in {repair.name for repair in REPAIRS}):
                raise ConfigError(f"there is no rule {name!r}; there are {', '.join(known)}")
        for name in limits:
            if not known[name].limit:
                raise ConfigError(f"the rule {name} has no limit; it can only be on or off")
        rules = tuple(
            (rule, limits.get(rule.name, rule.limit))
            for rule in RULES
            if rule.name not in off and (rule.is_on or rule.name in on or rule.name in limits)
        )
        return cls(rules, tuple(repair for repair in REPAIRS if repair.name not in off))

    def clean(self, row: Row) -> Row | LedgerLine:
        """The row, with a note for each repair; or the ledger's line that says why it goes."""
        better, names = repaired(row, self.repairs)
        for rule, limit in self.rules:
            reason = rule.check(better, limit)
            if reason:
                return LedgerLine(row.source, row.line, "dropped", rule.name, reason)
        return replace(better, notes=(*row.notes, *(Note(name) for name in names))) if names else better


def clean_rows(items: Iterable[Row | LedgerLine], cleaner: Cleaner) -> Iterator[Row | LedgerLine]:
    """What a reader yields, cleaned; lines of the ledger pass."""
    for item in items:
        yield cleaner.clean(item) if isinstance(item, Row) else item
