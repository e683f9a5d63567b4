"""The report's own words, in English and Chinese. What models said is never looked up here."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from server.errors import ConfigError

LANGUAGES = ("en", "zh")
_PLACE = re.compile(r"\{(\w+)\}")
_FOLDER = Path(__file__).parent / "i18n"


class Words:
    """`words("key", name=value)`: the sentence with its values. A missing key is a KeyError: a fault of ours."""

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise ConfigError(f"--language {language}: accepted are {', '.join(LANGUAGES)}")
        self.language = language
        self._texts = _texts(language)

    def __call__(self, key: str, **values: Any) -> str:
        # Not str.format: it would also look into a value's braces and attributes.
        return _PLACE.sub(lambda place: str(values[place[1]]), self._texts[key])


@cache
def _texts(language: str) -> dict[str, str]:
    value: dict[str, str] = json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return value
