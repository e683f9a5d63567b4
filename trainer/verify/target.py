"""The engine that an adapter is meant for: by its kind alone, or as a running server tells of itself."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigError
from server.store.servability import VLLM_RANKS, vllm_rank_for

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is unknown is None or "". `max_rank`: None takes any rank, or says nothing."""

    engine: str
    max_rank: int | None = None
    dtype: str = ""
    model: str = ""
    weights_hash: str = ""
    tokenizer_hash: str = ""
    chat_template_hash: str = ""
    default_system_prompt_hash: str = ""
    turn_end_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    url: str = ""

    @property
    def most_rank(self) -> int | None:
        """As it is set, else what its engine can be set to; None: any."""
        return self.max_rank or (VLLM_RANKS[-1] if self.engine == "vllm" else None)

    def limit_for(self, rank: int) -> str:
        """What lets it take this rank, in words; "" where nothing does. vLLM is built for certain limits only."""
        limit = vllm_rank_for(rank) if self.engine == "vllm" else rank
        return f"start the engine with QLOOP_MAX_ADAPTER_RANK={limit}" if limit else ""


class Server:
    """A running server of ours. All methods raise ConfigError when it cannot be asked."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def target(self) -> Target:
        """What it says of its engine. An operator's key is needed where the server has keys."""
        facts = self.get("/v1/adapters").get("engine")
        if not isinstance(facts, Mapping):
            raise ConfigError(f"{self.url}: does not tell about its engine; update that server, or use --engine")
        return Target(
            engine=str(facts["backend"]),
            max_rank=facts.get("max_adapter_rank"),
            dtype=str(facts.get("dtype", "")),
            model=str(facts.get("model", "")),
            weights_hash=str(facts.get("weights_hash", "")),
            tokenizer_hash=str(facts.get("tokenizer_hash", "")),
            chat_template_hash=str(facts.get("chat_template_hash", "")),
            default_system_prompt_hash=str(facts.get("default_system_prompt_hash") or ""),
            turn_end_id=facts.get("turn_end_id"),
            stop_token_ids=tuple(facts.get("stop_token_ids") or ()),
            url=self.url,
        )

    def model_of(self, revision: str) -> str | None:
        """`name@revision`, which stays this revision where the name is moved to another one meanwhile."""
        models = self.get("/v1/models")["data"]
        return next((str(one["root"]) for one in models if one.get("revision") == revision), None)

    def get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self.url + path, headers=self._headers))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), self._headers))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        if not request.full_url.startswith(("http://", "https://")):
            raise ConfigError(f"--server {self.url}: an http:// or https:// URL is needed")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                value = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{request.full_url}: {error.code} {_message(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"{request.full_url}: cannot be asked ({reason}); is the server running?") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{request.full_url}: answers with no JSON object; is this server one of ours?")
        return value


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
