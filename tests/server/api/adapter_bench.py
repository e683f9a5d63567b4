"""A service with three workers, folders of adapters under an allowed root, and questions that tell adapters apart."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.services import MODEL, Service

COMPLETIONS = "/v1/completions"
PROMPT = "one two three four five six seven eight nine ten, and then the same again. " * 3  # far over 64 tokens
WORKERS = 3

MakeFolder = Callable[[Path, int], Path]


@dataclass
class Bench:
    service: Service
    root: Path
    make_folder: MakeFolder
    num_tokens: int = 12
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)  # every request may meet another worker
        self.http = httpx.Client(base_url=self.service.url, limits=limits, timeout=60)

    def folder(self, name: str, seed: int) -> Path:
        """An adapter that has not been published; another seed, another answer."""
        return self.make_folder(self.root / name, seed)

    def add(self, name: str, seed: int, **body: Any) -> dict[str, Any]:
        """Import a folder by its path; the answer's card."""
        path = str(self.folder(f"{name}-{seed}", seed))
        response = self.http.post("/v1/adapters", json={"name": name, "path": path, **body})
        assert response.status_code == 200, response.text
        card: dict[str, Any] = response.json()
        return card

    def body(self, model: str, **more: Any) -> dict[str, Any]:
        greedy = {"temperature": 0, "max_tokens": self.num_tokens, "ignore_eos": True}
        return {"model": model, "prompt": PROMPT, **greedy, **more}

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.http.post(COMPLETIONS, json=self.body(model, **more))

    def text(self, model: str) -> str:
        response = self.ask(model)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def states(self) -> dict[str, str]:
        return {card["id"]: card["state"] for card in self.http.get("/v1/adapters").json()["data"]}

    def unload(self, adapter: str, mode: str = "wait") -> httpx.Response:
        return self.http.delete(f"/v1/adapters/{adapter}", params={"mode": mode})

    def clear(self) -> None:
        """Nothing is served or published any more."""
        for name in {adapter.partition("@")[0] for adapter in self.states()}:
            self.unload(name, "cancel")
            self.service_registry.remove(name)

    @property
    def service_registry(self) -> Any:
        from server.store.registry import Registry

        return Registry(self.service.home / "adapters")

    @property
    def num_loaded(self) -> int:
        num: int = self.http.get("/v1/adapters").json()["num_loaded"]
        return num

    def many(self, models: list[str]) -> list[httpx.Response]:
        """All at once, each over a connection of its own."""

        async def run() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=self.service.url, limits=limits, timeout=60) as client:
                bodies = [self.body(model) for model in models]
                return list(await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies)))

        return asyncio.run(run())


BASE = MODEL
