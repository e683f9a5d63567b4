"""The part of an adapter's self-test that needs no weights in memory: does it belong to this engine, is it whole?

What only the model can tell (shapes, numbers, a probe) is the backend's part. Knows folders, not requests.
"""

from server.engine.backends.base import AdapterError
from server.engine.messages import ModelInfo
from server.errors import ConfigError
from server.store.card import AdapterCard
from server.store.hashes import HashCache, folder_hash
from server.store.model_folder import read_json_object
from server.store.registry import CONFIG_NAME, AdapterEntry, check_adapter_folder
from server.store.servability import Verdict, largest_rank, servable
from server.text.identity import TextIdentity


class AdapterChecks:
    """Both checks raise AdapterError or RegistryError with the fault and its cure."""

    def __init__(self, model: ModelInfo, text: TextIdentity | None = None, max_rank: int | None = None) -> None:
        self._model = model
        self._text = text
        self._max_rank = max_rank
        self._hashes = HashCache(None)

    def check(self, entry: AdapterEntry) -> None:
        """By card, configuration and the weights' header: fast, however large the adapter is."""
        self._check_base(entry)
        self._check_text(entry)
        check_adapter_folder(entry.path)
        try:
            config = read_json_object(entry.path / CONFIG_NAME)
        except ConfigError as error:
            raise AdapterError(str(error)) from None
        self._check_rank(largest_rank(config))
        self._check_method(entry.card, servable(config))

    def check_content(self, entry: AdapterEntry) -> None:
        """A revision is named by its content, so nothing stale or foreign can hide behind its name.

        Reads every byte; later only of files that have changed.
        """
        try:
            revision = folder_hash(entry.path, hash_file=self._hashes.file_hash)
        except OSError as error:
            raise AdapterError(f"{entry.path} cannot be read ({error}). Mend that, or publish it again.") from None
        if revision != entry.revision:
            raise AdapterError(
                f"the files in {entry.path} were changed after it was published. Publish the original again, which "
                "takes their place, and load it; or publish these: they become a revision of their own."
            )

    def _check_base(self, entry: AdapterEntry) -> None:
        """An adapter changes the weights it was trained on and no others."""
        card, model = entry.card, self._model
        if entry.name == model.name:
            raise AdapterError(f"{entry.name!r} is the base model's name. Publish it under another.")
        if card.base_weights_hash != model.weights_hash:
            raise AdapterError(
                f"it was trained on {card.base_model} (weights {card.base_weights_hash[:12]}), "
                f"this engine runs {model.name} (weights {model.weights_hash[:12]}). "
                "Serve that base model, or train the adapter again on this one."
            )

    def _check_text(self, entry: AdapterEntry) -> None:
        """A card that does not say, says nothing against it."""
        if self._text is None:
            return
        for what, trained, served in (
            ("tokenizer", entry.card.tokenizer_hash, self._text.tokenizer_hash),
            ("chat template", entry.card.chat_template_hash, self._text.chat_template_hash),
            ("default system prompt", entry.card.default_system_prompt_hash, self._text.default_system_prompt_hash),
        ):
            if trained and served is not None and trained != served:
                raise AdapterError(
                    f"it was trained with another {what} ({trained[:12]}) than this model folder has "
                    f"({served[:12] or 'none'}). Put the folder's {what} back, or train the adapter again."
                )
        self._check_stops(entry, self._text.turn_end_id)

    def _check_stops(self, entry: AdapterEntry, turn_end_id: int | None) -> None:
        """It learned to end with these; an engine that does not know one would let it run on."""
        missing = set(entry.card.stop_token_ids) - {*self._model.stop_token_ids, turn_end_id}
        if missing:
            raise AdapterError(
                f"it was trained to stop at token {min(missing)}, which is no stop token of this model folder "
                f"({', '.join(map(str, self._model.stop_token_ids)) or 'it has none'}). Put its "
                "generation_config.json back, or train the adapter again."
            )

    def _check_rank(self, rank: int) -> None:
        if self._max_rank is not None and rank > self._max_rank:
            raise AdapterError(
                f"its rank is {rank}, this engine takes at most {self._max_rank}. "
                "Raise QLOOP_MAX_ADAPTER_RANK and restart the engine, or train it with a lower rank."
            )

    def _check_method(self, card: AdapterCard, verdict: Verdict) -> None:
        """The card knows the base's architecture, the verdict what the configuration says now."""
        if not verdict.backends:
            raise AdapterError(f"{verdict.notes[0]}.")
        backend = self._model.backend
        if card.backends and backend not in (*card.backends, "fake"):
            raise AdapterError(
                f"the {backend} engine does not serve {card.method} adapters, {' and '.join(card.backends)} does. "
                f"Start the engine with QLOOP_ENGINE={card.backends[0]}."
            )
