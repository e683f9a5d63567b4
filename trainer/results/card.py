"""An adapter's card: what it was trained on and with, and who can serve it. Reads folders, loads no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.store.card import AdapterCard
from server.store.hashes import text_hash, weights_hash
from server.store.model_folder import check_model_folder, read_json_object
from server.store.servability import largest_rank, servable
from server.text.identity import TextIdentity, default_system_prompt, text_identity
from server.text.render import ChatRenderer
from trainer.errors import NotServable


def make_card(
    adapter_config: Mapping[str, Any],
    base: Path,
    base_name: str,
    run: Mapping[str, Any],
    cache_path: Path | None = None,
) -> AdapterCard:
    """The card of an adapter with this `adapter_config.json` on the model in `base`.

    `run` is the run's record, {} for an adapter from elsewhere. Raises ConfigError for a base that cannot be served,
    and NotServable when its weights, tokenizer or chat template are not those the run trained with.
    """
    check_model_folder(base)
    renderer = ChatRenderer.load(base)
    text = checked_text(run, base)
    model_type = str(read_json_object(base / "config.json").get("model_type"))
    return AdapterCard(
        base_model=base_name,
        base_weights_hash=checked_base_hash(run.get("base_weights_hash"), base, cache_path),
        tokenizer_hash=text.tokenizer_hash,
        chat_template_hash=text.chat_template_hash,
        default_system_prompt_hash=text_hash(default_system_prompt(renderer)),
        stop_token_ids=_stop_ids(base, renderer),
        method=str(adapter_config["peft_type"]).lower(),
        rank=largest_rank(adapter_config),
        quantization_bit=run_bits(run),
        dataset_hash=str(run.get("dataset_hash", "")),
        run_id=str(run.get("id", "")),
        backends=servable(adapter_config, model_type).backends,
    )


def checked_base_hash(trained_on: str | None, base: Path, cache_path: Path | None = None) -> str:
    """The hash of the base's weights. Raises NotServable when another one is known to have been trained on."""
    found = weights_hash(base, cache_path=cache_path)
    if trained_on and trained_on != found:
        raise NotServable(f"{base}: its weights are not those the run trained on; name the right base with --base")
    return found


def checked_text(trained_with: Mapping[str, Any], base: Path) -> TextIdentity:
    """The hashes of the base's tokenizer and template. Raises NotServable when others are known to have been used."""
    found = text_identity(base)
    for name, what in (("tokenizer_hash", "tokenizer"), ("chat_template_hash", "chat template")):
        if trained_with.get(name) and trained_with[name] != getattr(found, name):
            raise NotServable(
                f"{base}: its {what} has changed since the run trained with it, so prompts would not be those it "
                "learned; put the old one back, name the right base with --base, or train again"
            )
    return found


def run_bits(run: Mapping[str, Any]) -> int:
    """Bits of the frozen base in the run, 0 if it was not quantized."""
    config = run.get("config")
    options = config if isinstance(config, Mapping) else {}
    bits = options.get("quantization_bit")
    return bits if isinstance(bits, int) else 4 if options.get("finetuning_type") == "qlora" else 0


def _stop_ids(base: Path, renderer: ChatRenderer) -> tuple[int, ...]:
    found = {renderer.turn_end_id} - {None}
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(base / name).get("eos_token_id") if (base / name).is_file() else None
        found |= set(value) if isinstance(value, list) else {value} - {None}
    return tuple(sorted(token for token in found if isinstance(token, int)))
