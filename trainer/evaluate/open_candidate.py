"""What a name or URL on the command line means: an engine of our own, or a server that runs somewhere."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.errors import ConfigError
from server.store.home import Home
from trainer.evaluate.candidate import Candidate
from trainer.evaluate.engine_candidate import engine_candidate


@dataclass(frozen=True, kw_only=True)
class CandidateOptions:
    """`engine`, `dtype` and `base` (of an adapter, in place of the one that it names) are for an engine of our own, the
    others for a URL: `tokenizer` is a model's folder."""

    engine: str = "auto"
    dtype: str = "auto"
    base: str | None = None
    tokenizer: Path | None = None
    concurrency: int = 16
    api_key: str | None = field(default=None, repr=False)


OF_ENGINES, OF_URLS = frozenset(("engine", "dtype", "base")), frozenset(("tokenizer", "concurrency"))


def check_options(names: Sequence[str], options: CandidateOptions) -> None:
    """Raises ConfigError for an option that none of the candidates would hear of."""
    changed = {each.name for each in fields(options) if getattr(options, each.name) != each.default}
    if not any(map(is_url, names)) and (unheard := changed & OF_URLS):
        raise ConfigError(f"--{min(unheard)}: is for a URL; {names[0]} runs in an engine of its own")
    if all(map(is_url, names)) and (unheard := changed & OF_ENGINES):
        raise ConfigError(f"--{min(unheard)}: is for an engine of our own; a URL's server has chosen already")


@contextlib.asynccontextmanager
async def open_candidate(name: str, home: Home, options: CandidateOptions) -> AsyncIterator[Candidate]:
    """`name`: a model, run or adapter, or `http://host:port/v1#model`.

    Raises ConfigError or RegistryError for what is not there, TrainerError when its engine does not start.
    """
    if is_url(name):
        check_url(name)
        from trainer.evaluate.url_candidate import url_candidate

        async with url_candidate(
            name, api_key=options.api_key, tokenizer=options.tokenizer, concurrency=options.concurrency
        ) as candidate:
            yield candidate
    else:
        settings: dict[str, Any] = {}
        if options.engine != "auto":
            settings["engine"] = options.engine
        if options.dtype != "auto":
            settings |= {"hf_dtype": options.dtype, "vllm_dtype": options.dtype}
        async with engine_candidate(name, home, settings, base=options.base) as own:
            yield own


def check_url(name: str) -> None:
    """Raises ConfigError for a URL that names no host, or a port that is no number."""
    try:
        parts = urlsplit(name)
        fault = "" if parts.hostname and parts.port != 0 else "no host, or port 0"
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ConfigError(f"{name}: is no server's URL ({fault}); give one such as http://127.0.0.1:8000/v1#model")


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
