"""Does a report speak of this adapter on this base? Compared by content hashes, never by name."""

from dataclasses import dataclass

from server.errors import ConfigError
from server.text.identity import TextIdentity
from trainer.compare.comparison import Candidate, Comparison
from trainer.evaluate.fingerprint import fingerprint


@dataclass(frozen=True)
class Subject:
    """An adapter, and the base it belongs to."""

    revision: str
    weights_hash: str
    text: TextIdentity


def candidate_of(comparison: Comparison, subject: Subject) -> int:
    """The place of the subject among the candidates. Raises ConfigError where the report is about something else."""
    if not _is(comparison.base, subject, ""):
        raise ConfigError(
            f"the report's base is {comparison.base.name} ({_known(comparison.base)}), not the base model of this "
            f"adapter (weights {subject.weights_hash[:12]}); compare again, with that base as the first candidate"
        )
    for place, candidate in enumerate(comparison.candidates):
        if place and candidate.revision == subject.revision and _is(candidate, subject, subject.revision):
            return place
    others = ", ".join(f"{one.name} ({_known(one)})" for one in comparison.candidates[1:]) or "nothing"
    raise ConfigError(
        f"the report compares {others}, not this adapter (revision {subject.revision}); compare it first: "
        "python -m trainer compare BASE RUN …"
    )


def _is(candidate: Candidate, subject: Subject, revision: str) -> bool:
    info = candidate.info
    expected = fingerprint(subject.weights_hash, revision, info.engine, subject.text)
    return bool(info.fingerprint) and info.fingerprint == expected


def _known(candidate: Candidate) -> str:
    if candidate.info.kind == "url":
        return "a URL, which cannot prove what it serves"
    return (
        f"adapter {candidate.info.adapter}" if candidate.info.adapter else f"fingerprint {candidate.info.fingerprint}"
    )
