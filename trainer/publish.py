"""A run's adapter, or any PEFT adapter folder, into the registry with a card that says what it belongs to.

`publish` only puts it there, for callers that have their own reasons (the demo, trials). `publish_proved` is what the
command line does: the revision enters either way, and the name moves when the gate passes or somebody forces it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.card import FORCED, PASSED, REFUSED, AdapterCard
from server.store.hashes import folder_hash
from server.store.home import Home
from server.store.names import NameRefused, check_name
from server.store.registry import AdapterEntry, NotProved, Registry
from server.text.identity import TextIdentity
from trainer.compare.belonging import Subject, candidate_of
from trainer.compare.comparison import Comparison
from trainer.errors import GateRefused
from trainer.gate import GateResult, GateRules, decide, without_evidence
from trainer.results.adapter_folder import FoundAdapter, find_adapter
from trainer.results.card import make_card


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A comparison and the sha256 of the report.json it came from."""

    comparison: Comparison
    report_hash: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """`gate` is what was decided; `is_forced` when the name moved all the same."""

    entry: AdapterEntry
    gate: GateResult
    is_forced: bool = False


def publish(folder: Path, name: str, home: Home, *, base: str | None = None, make_current: bool = True) -> AdapterEntry:
    """Publish a run folder (its `adapter`) or an adapter folder under `name`, without a gate.

    `base` is the base model's folder or hub id; by default the one that the run or adapter_config.json names. Raises
    ConfigError or RegistryError, saying what is missing, and NotServable for another base, tokenizer or
    template than the run's.
    """
    found, card = check_publishable(folder, name, home, base)
    return Registry(home.adapters).publish(found.folder, name, card, make_current=make_current)


def check_publishable(folder: Path, name: str, home: Home, base: str | None = None) -> tuple[FoundAdapter, AdapterCard]:
    """The adapter and the card it would get; nothing is written. Raises as `publish`."""
    try:
        check_name(name)
    except NameRefused as error:
        raise ConfigError(str(error)) from None
    found = find_adapter(folder, home, base)
    card = make_card(found.config, found.base, found.base_name, found.record, home.hash_cache)
    Registry(home.adapters).check_base(name, folder_hash(found.folder), card)
    return found, card


def publish_proved(
    folder: Path,
    name: str,
    home: Home,
    rules: GateRules,
    evidence: Evidence | None,
    *,
    base: str | None = None,
    force: str | None = None,
) -> Published:
    """Publish, and move the name only if the gate passes. `force`: a reason to move it whatever the gate says.

    Raises GateRefused naming each rule that refused (the revision is in the registry then, and its card says so);
    ConfigError for a report about another adapter or base; and what `publish` raises.
    """
    found, card = check_publishable(folder, name, home, base)
    place = candidate_of(evidence.comparison, _subject(folder_hash(found.folder), card)) if evidence else 0
    if evidence:
        gate = decide(evidence.comparison, place, rules)
    else:
        gate = without_evidence(rules, "nothing was measured; give --report DIR or --domain KIND=PATH")
    state = PASSED if gate.has_passed else REFUSED if force is None else FORCED
    proof: dict[str, Any] = {
        "scores": _scores(evidence.comparison, place) if evidence else {},
        "report_hash": evidence.report_hash if evidence else "",
        "gate": state,
        "gate_reason": _reason(gate, force),
    }
    registry = Registry(home.adapters)
    # It enters with its proof: one that has none for a moment could be promoted in that moment.
    entry = registry.publish(found.folder, name, replace(card, **proof), make_current=False)
    if evidence or not entry.card.gate:  # an earlier proof is not forgotten for want of a new one
        registry.annotate(name, entry.revision, **proof)
    if state == REFUSED:
        raise GateRefused(
            f"{name} still means {_meaning(registry, name)}: {gate.reasons}. {entry.id} is in the registry; "
            "--force --reason WHY moves the name to it, and its card says so"
        )
    return Published(entry=registry.promote(name, entry.revision, force=force), gate=gate, is_forced=state == FORCED)


def promote(name: str, revision: str, home: Home, *, force: str | None = None) -> AdapterEntry:
    """Point `name` at one of its revisions. One that the gate refused needs `force`, a reason; its card keeps it.

    Raises GateRefused and RegistryError.
    """
    try:
        return Registry(home.adapters).promote(name, revision, force=force)
    except NotProved as error:
        raise GateRefused(
            f"{error}. Publish it again with a report that passes, or promote it with --force --reason WHY, and its "
            "card says so"
        ) from None


def rollback(name: str, home: Home) -> AdapterEntry:
    """Point `name` back at what it meant before. Raises RegistryError when there is nothing to go back to."""
    registry = Registry(home.adapters)
    return registry.rollback(name, registry.previous(name).revision)


def _subject(revision: str, card: AdapterCard) -> Subject:
    """What a report about this adapter must be about."""
    return Subject(revision, card.base_weights_hash, TextIdentity(card.tokenizer_hash, card.chat_template_hash))


def _scores(comparison: Comparison, place: int) -> dict[str, float]:
    """The main score of each task, and its change from the base."""
    scores = {}
    for task in comparison.tasks:
        row = task.main_row
        value = row.values[place] if row else None
        if row is None or value is None:
            continue
        name = f"{task.task}/{row.metric}"
        scores[name] = value.mean
        if found := row.differences[place - 1]:
            scores[f"{name}/change"] = found.interval.mean
    return scores


def _reason(gate: GateResult, force: str | None) -> str:
    if gate.has_passed:
        return "; ".join(map(str, gate.results))
    return gate.reasons if force is None else f"{force}; {gate.reasons}"


def _meaning(registry: Registry, name: str) -> str:
    current = registry.current(name)
    return f"{name}@{current}" if current else "nothing"
