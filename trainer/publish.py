"""A run's adapter, or any PEFT adapter folder, into the registry with a card that says what it belongs to."""

from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.card import AdapterCard
from server.store.hashes import text_hash, weights_hash
from server.store.home import Home
from server.store.model_folder import check_model_folder, default_served_name, read_json_object, resolve_model
from server.store.registry import AdapterEntry, Registry, check_adapter_folder
from server.text.render import ChatRenderer
from trainer.run_folder import read_run

HF_ONLY = frozenset({"prefix_tuning", "prompt_tuning", "p_tuning", "ia3"})  # vLLM 0.32 serves none of them


def publish(folder: Path, name: str, home: Home, *, base: str | None = None) -> AdapterEntry:
    """Publish a run folder (its `adapter`) or an adapter folder under `name`.

    `base` is the base model's folder or hub id; by default the one that the run or adapter_config.json names. Raises
    ConfigError or RegistryError, saying what is missing.
    """
    run: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        run = read_run(folder)
        if run.get("state") != "done":
            raise ConfigError(f"{folder}: the run is {run.get('state')}, not done; train it to the end first")
        if run.get("output") != "adapter":
            raise ConfigError(
                f"{folder}: the run trained a whole model, not an adapter; serve {folder / 'model'} itself"
            )
        folder = folder / "adapter"
    check_adapter_folder(folder)
    config = read_json_object(folder / "adapter_config.json")
    base = base or run.get("base_path") or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder}: does not name its base model; give it with --base")
    card = _card(config, run, resolve_model(base, home), default_served_name(base), home)
    return Registry(home.adapters).publish(folder, name, card)


def _card(config: dict[str, Any], run: dict[str, Any], base: Path, base_name: str, home: Home) -> AdapterCard:
    check_model_folder(base)
    renderer = ChatRenderer.load(base)
    template = "" if renderer.template is None else renderer.template.source
    method = str(config["peft_type"]).lower()
    rank = config.get("r")
    return AdapterCard(
        base_model=base_name,
        base_weights_hash=_same_base(run, weights_hash(base, cache_path=home.hash_cache), base),
        tokenizer_hash=text_hash((base / "tokenizer.json").read_text(encoding="utf-8")),
        chat_template_hash=text_hash(template),
        default_system_prompt_hash=text_hash(_default_system_prompt(renderer)),
        stop_token_ids=_stop_ids(base, renderer),
        method=method,
        rank=rank if isinstance(rank, int) else 0,
        dataset_hash=str(run.get("dataset_hash", "")),
        run_id=str(run.get("id", "")),
        backends=_backends(method, config),
    )


def _backends(method: str, config: dict[str, Any]) -> tuple[str, ...]:
    """Who can serve it; nobody serves what has to be merged into the base model first."""
    if method in HF_ONLY:
        return ("hf",)
    return ("hf", "vllm") if method == "lora" and not config.get("use_dora") else ()


def _same_base(run: dict[str, Any], found: str, base: Path) -> str:
    trained_on = run.get("base_weights_hash", found)
    if trained_on != found:
        raise ConfigError(f"{base}: its weights are not those the run trained on; name the right base with --base")
    return found


def _default_system_prompt(renderer: ChatRenderer) -> str:
    """What the template puts before a first user's turn."""
    if renderer.template is None:
        return ""
    text = renderer.render_text([{"role": "user", "content": "\0"}], add_generation_prompt=False)
    return text.partition("\0")[0]


def _stop_ids(base: Path, renderer: ChatRenderer) -> tuple[int, ...]:
    found = {renderer.turn_end_id} - {None}
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(base / name).get("eos_token_id") if (base / name).is_file() else None
        found |= set(value) if isinstance(value, list) else {value} - {None}
    return tuple(sorted(token for token in found if isinstance(token, int)))
