"""Which modules of a model an adapter changes, by its adapter_config.json: PEFT's rules, without importing peft.

They are those of `check_target_module_exists` in PEFT 0.21's `tuners/tuners_utils.py`. Knows names only.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Of a name such as model.layers.3.self_attn.q_proj, where no layers_pattern is given.
_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."


def adapted_modules(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Those of `modules` that PEFT adapts, in their order; none where the configuration does not tell."""
    if config.get("ensure_weight_tying"):  # then PEFT takes some of them out again, by the weights that they share
        return []
    try:
        return [name for name in modules if _is_adapted(config, name)]
    except (TypeError, ValueError, re.error):
        return []


def _is_adapted(config: Mapping[str, Any], name: str) -> bool:
    targets = config.get("target_modules") or ()
    if _is_meant(config.get("exclude_modules") or (), name) or not _is_meant(targets, name):
        return False
    return isinstance(targets, str) or name in targets or _is_in_layers(config, name)


def _is_meant(names: Any, name: str) -> bool:
    """A string is a pattern for the whole name. Of a list, an entry is the whole name or its last dotted parts.

    PEFT's word "all-linear" matches no name; a saved configuration lists what it stood for.
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in names)


def _is_in_layers(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    given = config.get("layers_pattern") or ()
    lists = [given] if isinstance(given, str) else given
    patterns = [rf"(?:^|.*?\.){layers}\.(?P<index>\d+)\." for layers in lists] or [_ANY_LAYER]
    found = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
    return found is not None and int(found["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
