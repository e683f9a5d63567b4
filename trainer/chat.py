"""`chat`: an engine as a child process, and questions typed into it. What is tried is what is served.

A run's adapter is put into a registry of its own for the time of the talk; the real registry stays as it is.
"""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from server.engine.client import EngineClient
from server.engine.messages import Generate, SamplingParams
from server.errors import QloopError
from server.settings import environment_for_children
from server.store.home import Home
from server.store.model_folder import resolve_model
from server.store.registry import Registry, RegistryError
from server.text.detokenize import Detokenizer
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.errors import TrainerError
from trainer.publish import publish
from trainer.results.adapter_folder import find_adapter
from trainer.runs.run_folder import read_run

TRIAL = "trial"
START_TIMEOUT_S = 1800.0  # a large model is read from a slow disk
PROMPT = "> "
HELP = "An empty line or /exit ends, /new forgets what was said."


@dataclass(frozen=True)
class Trial:
    """What to talk to: a model folder, and an adapter of its own registry if any."""

    model: Path
    home: Home
    adapter: str | None = None


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


def find_trial(name: str, home: Home, work: Path) -> Trial:
    """`name` is a run's id or folder, an adapter's folder or published name, or a model."""
    trial_home = Home(work)
    home.cache.mkdir(parents=True, exist_ok=True)
    trial_home.cache.symlink_to(home.cache.resolve())  # hashes of large models are computed once
    folder = Path(name).expanduser()
    if not folder.is_dir() and (home.runs / name / "run.json").is_file():
        folder = home.runs / name
    base = None
    if not folder.is_dir():
        with contextlib.suppress(RegistryError):
            entry = Registry(home.adapters).get(name)
            folder, base = entry.path, entry.card.base_model
    if (folder / "run.json").is_file() and read_run(folder).get("output") == "model":
        return Trial(folder / "model", trial_home)
    if (folder / "run.json").is_file() or (folder / "adapter_config.json").is_file():
        found = find_adapter(folder, home, base)
        publish(folder, TRIAL, trial_home, base=str(found.base))
        return Trial(found.base, trial_home, TRIAL)
    return Trial(resolve_model(name, home), trial_home)


async def _talk(trial: Trial, talk: Talk, socket: Path) -> None:
    async with _engine(trial, socket) as client:
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
    adapter = next((info.id for info in client.adapters if info.name == trial.adapter), None)
    stops = {*client.model.stop_token_ids, talk.renderer.turn_end_id} - {None}
    request = Generate(
        request_id=f"chat-{next(_COUNTER)}",
        prompt_token_ids=talk.renderer.render(asked),
        params=_with_stops(talk.params, tuple(stop for stop in stops if stop is not None)),
        adapter=adapter,
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


def _with_stops(params: SamplingParams, stops: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(max_tokens=params.max_tokens, temperature=params.temperature, stop_token_ids=stops)


@contextlib.asynccontextmanager
async def _engine(trial: Trial, socket: Path) -> AsyncIterator[EngineClient]:
    """A running engine. Raises TrainerError with the end of its log when it does not come up."""
    settings = {"home": trial.home.path, "model": str(trial.model), "engine_socket": socket}
    log = trial.home.path / "engine.log"
    print("starting the engine", file=sys.stderr)
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "server.engine"],
            env=environment_for_children(settings),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = EngineClient(socket, heartbeat_timeout_s=60.0)
    client.start()
    try:
        await _wait_ready(child, client, log)
        yield client
    finally:
        await client.close()
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        child.kill()
        child.wait()


async def _wait_ready(child: "subprocess.Popen[bytes]", client: EngineClient, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while not client.is_ready:
        late = asyncio.get_running_loop().time() > deadline
        if child.poll() is not None or client.refusal or late:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise TrainerError(f"the engine did not start: {client.refusal or last[0]}")
        with contextlib.suppress(QloopError):
            await client.wait_ready(0.5)
