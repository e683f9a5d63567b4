"""`chat`: an engine as a child process, and questions typed into it. What is tried is what is served."""

import asyncio
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from server.engine.client import EngineClient
from server.engine.messages import Generate, SamplingParams
from server.errors import QloopError
from server.store.home import Home
from server.text.detokenize import Detokenizer
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.child_engine import Trial, adapter_id, child_engine, find_trial

PROMPT = "> "
HELP = "An empty line or /exit ends, /new forgets what was said."


@dataclass
class Talk:
    """One conversation. Owned by the loop that asks."""

    renderer: ChatRenderer
    system: str | None
    params: SamplingParams
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []


def chat(name: str, home: Home, *, system: str | None, max_tokens: int, temperature: float) -> int:
    """Talk on stdin and stdout until the input ends. Raises ConfigError or RegistryError for what cannot be served."""
    with tempfile.TemporaryDirectory(prefix="qloop-") as folder:  # short: a Unix socket's path may have 107 bytes
        trial = find_trial(name, home, Path(folder))
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        talk = Talk(ChatRenderer.load(trial.model), system, params)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_talk(trial, talk, Path(folder) / "s"))
    return 0


async def _talk(trial: Trial, talk: Talk, socket: Path) -> None:
    print("starting the engine", file=sys.stderr)
    async with child_engine(trial, socket) as client:
        print(HELP, file=sys.stderr)
        for line in _lines():
            if line == "/new":
                talk.forget()
                continue
            try:
                await _answer(client, trial, talk, line)
            except (QloopError, TextError, TemplateError) as error:
                print(f"error: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("", "/exit"):
            return
        yield line


async def _answer(client: EngineClient, trial: Trial, talk: Talk, question: str) -> None:
    """Print the answer; a question that fails is no part of the talk."""
    assert client.model is not None
    asked = [*talk.messages, {"role": "user", "content": question}]
    turn_end = talk.renderer.turn_end_id
    stops = () if turn_end is None else (turn_end,)  # beside the model's own
    request = Generate(
        request_id=f"chat-{next(_COUNTER)}",
        prompt_token_ids=talk.renderer.render(asked),
        params=msgspec.structs.replace(talk.params, stop_token_ids=stops),
        adapter=adapter_id(client, trial),
    )
    detokenizer = Detokenizer(talk.renderer.tokenizer)
    generation = await client.generate(request)
    answer = ""
    while not generation.is_finished:
        for output in await generation.next():
            text = "".join(detokenizer.add(token) for token in output.new_token_ids)
            answer += text
            print(text, end="", flush=True)
            if output.error:
                print(f"error: {output.error}", file=sys.stderr)
    client.forget(generation)
    print()
    talk.messages = [*asked, {"role": "assistant", "content": answer}]


_COUNTER = itertools.count(1)
