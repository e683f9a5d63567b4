"""An adapter and its base -> one model folder: merged in float32, cast to the base's dtype, checked, then kept.

Knows nothing about runs beyond where their adapter lies.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import check_model_folder, read_model_config
from server.store.registry import CONFIG_NAME, WEIGHTS_NAME
from server.store.safetensors_check import read_header
from trainer.errors import NotServable
from trainer.methods.base_model import load_base, saved_dtype
from trainer.results.adapter_folder import FoundAdapter, find_adapter
from trainer.results.card import checked_base_hash
from trainer.results.comparison import largest_gap, logits_of, prompt_ids, same_tokens
from trainer.results.save import write_model, written_aside

# float32 sums in another order; more than this share of the logits' spread is a wrong merge, not rounding.
EXACT_SHARE = 1e-3
PROMPT_TYPES = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"})


@dataclass(frozen=True)
class MergeReport:
    """`exact_gap` and `cast_gap`: largest difference of a logit from base + adapter, before and after the cast."""

    output: Path
    base: Path
    dtype: str
    exact_gap: float
    cast_gap: float
    same_tokens: float  # share of places where the most likely token is the same
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"merged into {self.output} ({self.dtype})",
            f"largest logit gap to base + adapter: {self.exact_gap:.2g} in float32, {self.cast_gap:.2g} as saved; "
            f"same most likely token at {100 * self.same_tokens:.1f}% of places",
        ]
        return "\n".join([*lines, *self.notes])


def merge(folder: Path, output: Path, home: Home, *, base: str | None = None, trust: bool = False) -> MergeReport:
    """Merge a run's adapter or an adapter folder into its base, as a complete model folder `output`.

    Raises ConfigError for what cannot be merged, and NotServable for another base than the one trained on. Nothing is
    left at `output` then.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already; choose another output, or remove it")
    found = find_adapter(folder, home, base)
    check_mergeable(found)
    check_model_folder(found.base)
    checked_base_hash(found.trained_on, found.base, home.hash_cache)
    prompts = prompt_ids(found.base)
    model = with_adapter(found, trust)
    expected = logits_of(model, prompts)
    merged = merged_model(model, found)
    exact = logits_of(merged, prompts)
    _check_exact(found.folder, expected, exact)
    with written_aside(output) as aside:
        write_model(merged, found.base, aside)
        del model, merged  # a large model need not be in memory twice
        saved = logits_of(load_base(aside, dtype=saved_dtype(found.base), trust_remote_code=trust), prompts)
    return MergeReport(
        output=output,
        base=found.base,
        dtype=str(saved_dtype(found.base)).removeprefix("torch."),
        exact_gap=largest_gap(expected, exact),
        cast_gap=largest_gap(expected, saved),
        same_tokens=same_tokens(expected, saved),
        notes=_notes(found),
    )


def check_mergeable(found: FoundAdapter) -> None:
    """Raise ConfigError, with the cure, for an adapter that is no change of the base's weights."""
    method = str(found.config["peft_type"]).upper()
    if method in PROMPT_TYPES:
        raise ConfigError(
            f"{found.folder}: a {method} adapter is virtual tokens, not a change of weights, and cannot be merged; "
            "publish it and serve it with the hf engine"
        )
    if method not in {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise ConfigError(
            f"{found.folder / CONFIG_NAME}: peft_type={method!r} is no method of peft {version('peft')}; "
            "merge it with the library that made it"
        )
    quantized = read_model_config(found.base).get("quantization_config")
    if quantized:
        raise ConfigError(
            f"{found.base}: its weights are quantized, and merging into them loses the adapter; name the 16-bit base "
            "with --base"
        )


def _notes(found: FoundAdapter) -> tuple[str, ...]:
    if not found.bits:
        return ()
    return (
        f"the adapter was trained on a {found.bits}-bit copy of {found.base_name}; it is merged into {found.base_name} "
        f"itself, in 16 or 32 bits ({found.base}), whose weights differ from that copy by its rounding",
    )


def with_adapter(found: FoundAdapter, trust: bool) -> Any:
    """The base with the adapter, in float32 and not merged yet."""
    model = load_base(found.base, dtype=torch.float32, trust_remote_code=trust)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below, as an error
            adapted = PeftModel.from_pretrained(model, str(found.folder)).eval()
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotServable(
            f"{found.folder}: does not fit {found.base} ({type(error).__name__}: {reason}); it belongs to another "
            "base: name that one with --base"
        ) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(wanted.keys() - read_header(found.folder / WEIGHTS_NAME).keys())
    if missing:
        raise ConfigError(
            f"{found.folder / WEIGHTS_NAME}: lacks {len(missing)} of its weights ({missing[0]}, …); "
            "copy the adapter again"
        )
    return adapted


def merged_model(model: Any, found: FoundAdapter) -> Any:
    """The base's own class again, with the adapter's change in its weights. Raises ConfigError."""
    try:
        return model.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{found.folder}: peft cannot merge a {found.config['peft_type']} adapter ({type(error).__name__}: {error})"
        ) from error


def _check_exact(adapter: Path, expected: torch.Tensor, exact: torch.Tensor) -> None:
    gap, spread = largest_gap(expected, exact), float(expected.max() - expected.min())
    if not gap <= EXACT_SHARE * spread:
        raise NotServable(
            f"{adapter}: merged in float32 it computes something else than base + adapter (logits differ by {gap:.3g}, "
            f"their spread is {spread:.3g}); nothing was written. Serve the adapter with the hf engine instead"
        )
