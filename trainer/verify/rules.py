"""After training: may the engine serve this adapter at all, and does it read prompts as the adapter learned them?"""

from collections.abc import Iterator

from server.store.card import AdapterCard
from server.store.model_folder import read_model_config
from server.store.registry import WEIGHTS_NAME
from server.store.safetensors_check import read_header
from server.store.servability import largest_rank, servable
from trainer.results.adapter_folder import FoundAdapter
from trainer.verify.findings import Finding, fault, note, ok
from trainer.verify.target import Target

LORA_PARTS = (".lora_A.", ".lora_B.")


def check_rules(found: FoundAdapter, card: AdapterCard, target: Target) -> Iterator[Finding]:
    """By files and hashes alone."""
    # Of rank 1: what the rank itself allows is a finding of its own.
    options = {**found.config, "r": 1, "rank_pattern": None}
    verdict = servable(options, str(read_model_config(found.base).get("model_type")))
    if target.engine not in (*verdict.backends, "fake"):
        cure = verdict.notes[0] if verdict.notes else f"it is served {verdict}"
        yield fault("method", f"the {target.engine} engine does not serve this {card.method} adapter", cure)
    else:
        yield ok("method", f"the {target.engine} engine serves {card.method} adapters")
    if card.method == "lora":
        yield _tensors(found)
        yield _rank(found, target)
    if found.bits:
        yield note(
            "base", f"trained on a {found.bits}-bit copy of {found.base_name}; served and compared on the base itself"
        )
    if target.url:
        yield from _text(card, target)


def _tensors(found: FoundAdapter) -> Finding:
    names = read_header(found.folder / WEIGHTS_NAME).keys()
    others = sorted(name for name in names if not any(part in name for part in LORA_PARTS))
    if others:
        return fault(
            "tensors",
            f"{len(others)} tensors are neither lora_A nor lora_B ({others[0]}, …)",
            "train without them, or merge the adapter into its base",
        )
    return ok("tensors", f"{len(names)} tensors, lora_A and lora_B only")


def _rank(found: FoundAdapter, target: Target) -> Finding:
    rank, most = largest_rank(found.config), target.most_rank
    if most is not None and rank > most:
        raise_it = target.limit_for(rank)
        cure = f"{raise_it}{', or ' if raise_it else ''}train with lora_rank={most}"
        return fault("rank", f"rank {rank}, the engine takes at most {most}", cure)
    return ok("rank", f"rank {rank}" + (f" of at most {most}" if most else ""))


def _text(card: AdapterCard, target: Target) -> Iterator[Finding]:
    """What the card has hashed against what the server runs."""
    for what, trained, served in (
        ("base weights", card.base_weights_hash, target.weights_hash),
        ("tokenizer", card.tokenizer_hash, target.tokenizer_hash),
        ("chat template", card.chat_template_hash, target.chat_template_hash),
        ("default system prompt", card.default_system_prompt_hash, target.default_system_prompt_hash),
    ):
        if trained != served:
            cure = f"serve the {what} it was trained with, or train it again"
            yield fault(what, f"trained with {trained[:12] or 'none'}, served with {served[:12] or 'none'}", cure)
        else:
            yield ok(what, f"the same, {trained[:12]}")
    missing = set(card.stop_token_ids) - {*target.stop_token_ids, target.turn_end_id}
    if missing:
        cure = "put the base's generation_config.json back, or train it again"
        yield fault("stop tokens", f"it learned to end with {sorted(missing)}, which do not stop that server", cure)
    else:
        yield ok("stop tokens", ", ".join(map(str, card.stop_token_ids)))
