"""After training: the same prompts through HF + PEFT, the merged weights, and an engine or a server, token by token.

Reading order: `prove` -> `check_rules` (files and hashes) -> `_reference` (torch) -> `_served` (a child or a URL).
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.engine.client import EngineClient
from server.errors import ConfigError, QloopError, ServerError
from server.store.card import AdapterCard
from server.store.hashes import folder_hash
from server.store.home import Home
from server.store.model_folder import num_positions, read_model_config
from server.text.render import ChatRenderer
from trainer.child_engine import Trial, adapter_id, child_engine, find_trial, last_words
from trainer.errors import NotServable
from trainer.results.adapter_folder import FoundAdapter
from trainer.results.card import make_card
from trainer.verify.findings import Finding, fault, note, ok
from trainer.verify.parity import CLEAR_GAPS, NONE, Agreement, Reference, compare, compare_choices
from trainer.verify.rules import check_rules
from trainer.verify.sources import EngineSource, ServerSource
from trainer.verify.target import Server, Target

MIN_MERGED_SHARE = 0.99
PROMPTS = Path(__file__).with_name("prompts.json")
MAX_IN_FLIGHT = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to prove. Without `server` an engine of kind `target.engine` is started as a child."""

    found: FoundAdapter
    home: Home
    target: Target
    server: Server | None = None
    prompts: Sequence[str]
    num_tokens: int
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class Proof:
    findings: tuple[Finding, ...]
    revision: str
    num_prompts: int
    num_tokens: int
    served: Agreement = NONE
    merged: Agreement = NONE

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.state == "fault")

    def check(self) -> None:
        """Raise NotServable with the first fault."""
        if self.faults:
            rest = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            raise NotServable(f"{self.faults[0].check}: {self.faults[0]}{rest}")


def default_prompts(count: int) -> list[str]:
    prompts: list[str] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    if not 0 < count <= len(prompts):
        raise ConfigError(f"--prompts {count}: 1 to {len(prompts)} are there")
    # Every other one of the two languages, so that few prompts have both.
    half = len(prompts) // 2
    return [prompts[number // 2 + half * (number % 2)] for number in range(count)]


def prove(job: Job, say: Callable[[str], None]) -> Proof:
    """Everything that can be found out; a fault of the rules ends it before anything is loaded.

    Raises ConfigError, also for more tokens than the base has positions, NotServable for another base, TrainerError
    when the engine does not start.
    """
    found = job.found
    card = make_card(found.config, found.base, found.base_name, found.record, job.home.hash_cache)
    findings = list(check_rules(found, card, job.target))
    revision = folder_hash(found.folder)
    facts = {"revision": revision, "num_prompts": len(job.prompts), "num_tokens": job.num_tokens}
    if any(one.state == "fault" for one in findings):
        return Proof(findings=tuple(findings), **facts)  # type: ignore[arg-type]
    renderer = ChatRenderer.load(found.base)
    _check_length(job, renderer)
    expected, merged = _reference(job, renderer, findings, say)
    served = asyncio.run(_served(job, card, revision, renderer, expected, findings, say))
    return Proof(findings=tuple(findings), served=served, merged=merged, **facts)  # type: ignore[arg-type]


def _check_length(job: Job, renderer: ChatRenderer) -> None:
    """Raises ConfigError before the slow reference where no engine could go on for so long."""
    from trainer.verify.reference import prompt_ids

    positions = num_positions(read_model_config(job.found.base))
    longest = max(len(prompt_ids(renderer, prompt)) for prompt in job.prompts)
    extra = 1 if job.server else 0  # a server writes one more token where it reads the reference's answer
    if positions is not None and longest + job.num_tokens + extra > positions:
        raise ConfigError(
            f"--tokens {job.num_tokens}: {job.found.base} has {positions} positions, and the longest prompt takes "
            f"{longest}; take at most {positions - longest - extra}"
        )


def _reference(
    job: Job, renderer: ChatRenderer, findings: list[Finding], say: Callable[[str], None]
) -> tuple[list[Reference], Agreement]:
    """Loads the model here, and lets go of it before an engine starts."""
    from trainer.verify.reference import can_merge, load_adapted, merged_agreement, references

    say(f"{len(job.prompts)} prompts x {job.num_tokens} tokens through transformers and PEFT, in float32")
    model = load_adapted(job.found, trust=job.trust)
    expected = references(model, renderer, job.prompts, job.num_tokens)
    if not can_merge(job.found):
        findings.append(note("merged", f"a {job.found.config['peft_type']} adapter cannot be merged"))
        return expected, NONE
    say("the same through the merged weights")
    merged, dtype = merged_agreement(model, job.found, expected)
    text = f"{merged.num_same} of {merged.num_tokens} tokens are the same ({100 * merged.share:.2f} %), cast to {dtype}"
    if merged.share < MIN_MERGED_SHARE:
        findings.append(
            fault(
                "merged", f"{text}; {100 * MIN_MERGED_SHARE:g} % are needed", "serve the adapter instead of merging it"
            )
        )
    else:
        findings.append(ok("merged", text))
    return expected, merged


async def _served(
    job: Job,
    card: AdapterCard,
    revision: str,
    renderer: ChatRenderer,
    expected: Sequence[Reference],
    findings: list[Finding],
    say: Callable[[str], None],
) -> Agreement:
    if job.server is not None:
        model = await asyncio.to_thread(job.server.model_of, revision)
        if model is None:
            cure = f"publish it where {job.server.url} looks, and verify again"
            findings.append(fault("served", f"{job.server.url} does not serve revision {revision}", cure))
            return NONE
        say(f"the same through {job.server.url}, model {model}")
        return await _through_server(ServerSource(job.server, model, renderer), job.target, expected, findings)
    say(f"the same through an {job.target.engine} engine")
    with tempfile.TemporaryDirectory(prefix="qloop-") as folder:
        trial = find_trial(str(job.found.folder), job.home, Path(folder), str(job.found.base))
        async with child_engine(trial, Path(folder) / "s", {"engine": job.target.engine}) as client:
            try:
                return await _through_engine(client, trial, expected, findings)
            except NotServable as error:
                findings.append(fault("served", str(error)))
            except QloopError as error:
                died = f" (its last words: {last_words(trial)})" if isinstance(error, ServerError) else ""
                findings.append(fault("served", f"the {job.target.engine} engine gave no answer: {error}{died}"))
            return NONE


async def _through_engine(
    client: EngineClient, trial: Trial, expected: Sequence[Reference], findings: list[Finding]
) -> Agreement:
    """Raises NotServable for an adapter that the engine refused, QloopError where it refuses a request or dies."""
    adapter = adapter_id(client, trial)
    assert adapter is not None and client.model is not None
    source = EngineSource(client, adapter)
    gap = clear_gap(client.model.dtype)
    agreement = await _all(expected, lambda one: compare(one, source.go_on, source.label, gap))
    findings.append(_verdict(agreement, f"{client.model.backend} {client.model.dtype}", gap))
    return agreement


async def _through_server(
    source: ServerSource, target: Target, expected: Sequence[Reference], findings: list[Finding]
) -> Agreement:
    gap = clear_gap(target.dtype)

    async def chosen(reference: Reference) -> Agreement:
        return compare_choices(reference, await source.choices(reference), gap)

    name = f"{target.engine} {target.dtype} at {target.url}"
    written = await _all(expected, lambda one: compare(one, source.go_on, source.label, gap))
    findings.append(_verdict(written, name, gap))
    findings.append(_verdict(await _all(expected, chosen), f"{name}, reading the reference", gap))
    return written


def clear_gap(dtype: str) -> float:
    """Raises ConfigError for an engine whose weights are not the reference's."""
    if dtype not in CLEAR_GAPS:
        raise ConfigError(
            f"the engine computes with {dtype} weights, which are not those that were trained on; verify with "
            f"{' or '.join(CLEAR_GAPS)} (QLOOP_HF_DTYPE, QLOOP_VLLM_DTYPE), unquantized"
        )
    return CLEAR_GAPS[dtype]


def _verdict(agreement: Agreement, name: str, gap: float) -> Finding:
    text = f"{name}: {agreement.num_same} of {agreement.num_tokens} tokens are the same"
    if agreement.disagreements:
        first = agreement.disagreements[0]
        return fault("served", f"{text}; {len(agreement.disagreements)} differ where the reference is clear: {first}")
    ties = agreement.num_tokens - agreement.num_same
    return ok("served", text + (f", the other {ties} are ties below {gap:g} nat" if ties else ""))


async def _all(expected: Sequence[Reference], one: Callable[[Reference], object]) -> Agreement:
    """A few at a time, as a server is used."""
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def run(reference: Reference) -> Agreement:
        async with slots:
            found: Agreement = await one(reference)  # type: ignore[misc]
            return found

    total = NONE
    for agreement in await asyncio.gather(*(run(reference) for reference in expected)):
        total += agreement
    return total
