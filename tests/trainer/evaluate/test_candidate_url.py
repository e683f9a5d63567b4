"""A candidate behind a URL: our own server's figures are its engine's; what a server lacks or does wrong is said."""

import asyncio
import http.server
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.client import EngineClient
from server.errors import ConfigError
from server.store.home import Home
from tests.conftest import StartService
from tests.server.engine.adapters import write_folder
from tests.services import MODEL, Service
from tests.trainer.evaluate.scripted import text
from trainer.child_engine import Trial
from trainer.errors import DriftError
from trainer.evaluate.candidate import AnswerLimits, Candidate, CandidateChanged, CandidateLost, Prompt
from trainer.evaluate.engine_candidate import EngineCandidate
from trainer.evaluate.eval_folder import read_scores
from trainer.evaluate.run import evaluate
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.text import BbhTask
from trainer.evaluate.url_candidate import LOOKS, url_candidate

PLAIN = Prompt(text="今天天气很好\n答案：")
CHAT = Prompt(messages=({"role": "user", "content": "你是谁？"},))
LETTERS = ["A", "B", "C", "D"]
PHRASES = ["你好，世界", "我是一个助手"]


async def _figures(candidate: Candidate) -> dict[str, Any]:
    letters = await candidate.next_logprobs([PLAIN, CHAT], [LETTERS] * 2)
    phrases = await candidate.next_logprobs([PLAIN, CHAT], [PHRASES] * 2)
    references = await candidate.loglikelihoods([CHAT, PLAIN], ["我是一个助手"] * 2)
    answers = await candidate.answers([CHAT, PLAIN], AnswerLimits(max_tokens=20))
    return {
        "letters": [found.values for found in letters],
        "phrases": [found.values for found in phrases],
        "references": [(found.total, found.num_tokens, found.num_prompt_tokens) for found in references],
        "answers": [(found.text, found.finish_reason, found.num_tokens, found.num_prompt_tokens) for found in answers],
    }


@pytest.fixture(scope="module")
def of_the_engine(service: Service, fake_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        client = EngineClient(service.socket_path)
        client.start()
        try:
            await client.wait_ready(30)
            trial = Trial(fake_model, Home(tmp_path_factory.mktemp("trial")))
            return await _figures(EngineCandidate(client, trial, "fake"))
        finally:
            await client.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("has_tokenizer", [False, True])
async def test_a_url_gives_its_engines_figures(
    service: Service, fake_model: Path, of_the_engine: dict[str, Any], has_tokenizer: bool
) -> None:
    tokenizer = fake_model if has_tokenizer else None
    async with url_candidate(f"{service.url}/v1#{MODEL}", tokenizer=tokenizer) as candidate:
        found = await _figures(candidate)
        assert candidate.info.model == MODEL and candidate.info.fingerprint.startswith("fp_")
    for name in ("letters", "phrases"):
        for ours, theirs in zip(found[name], of_the_engine[name], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    assert found["answers"] == of_the_engine["answers"]
    for ours, theirs in zip(found["references"], of_the_engine["references"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


async def test_what_the_server_has(service: Service) -> None:
    with pytest.raises(ConfigError, match=f"it serves {MODEL}"):
        async with url_candidate(f"{service.url}/v1#nobody"):
            pass
    async with url_candidate(f"{service.url}/v1") as candidate:
        assert candidate.info.model == MODEL  # its only one
        long = await candidate.answers([Prompt(text="x " * 3000), PLAIN], AnswerLimits(max_tokens=2))
        assert long[0].error.startswith("http-400") and not long[1].error


@pytest.mark.slow
@pytest.mark.e2e
async def test_a_url_that_dies_half_way_and_comes_back(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(workers=1, fake_tokens_per_s=60, max_num_seqs=2)
    name = f"{service.url}/v1#{MODEL}"
    settings = EvalSettings(max_tokens=12)
    task = BbhTask("bbh/bench", [text(f"q{n}", "yes") for n in range(24)], settings)

    async def run() -> Any:
        async with url_candidate(name, concurrency=4, patience_s=0.5) as candidate:
            return await evaluate(candidate, [task], tmp_path, settings, shows_progress=False)

    async def kill_after(count: int) -> None:
        while len(read_scores(tmp_path)) < count:
            await asyncio.sleep(0.02)
        assert service.gunicorn is not None
        os.killpg(service.gunicorn.pid, signal.SIGKILL)
        service.gunicorn.wait()

    killer = asyncio.create_task(kill_after(5))
    with pytest.raises(CandidateLost, match=r"no answer for .*of 24 items are kept in .*; run the same command again"):
        await run()
    await killer
    kept = read_scores(tmp_path)
    assert 5 <= len(kept) < 24 and all("error" not in score.details for score in kept.values())
    service.gunicorn = service._start("gunicorn", ["-m", "gunicorn", "-c", "gunicorn.conf.py", "server.app:app"])
    await asyncio.to_thread(service.wait_ready)
    result = await run()
    assert result.tasks[0].num_scored == 24 and result.speed["num_items"] == 24 - len(kept)
    assert {key: score for key, score in read_scores(tmp_path).items() if key in kept} == kept


Reply = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], Any]]


@pytest.fixture
def plain_server() -> Iterator[Callable[[Reply], str]]:
    """Another make of server: it answers as the test's function says."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(reply: Reply) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(404, {}, {"error": {"message": "no such route"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(*reply(self.path, body))

            def _send(self, status: int, headers: dict[str, str], value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                for name, given in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, given)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1#m"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "text": text, "finish_reason": "stop"}]}


async def test_a_server_that_only_chats(plain_server: Callable[[Reply], str]) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path != "/v1/chat/completions" or "logprob_token_ids" in body:
            return 404, {}, {"error": {"message": "no such route"}}
        return 200, {}, _said("B")

    async with url_candidate(plain_server(reply), patience_s=1) as candidate:
        assert (await candidate.answers([CHAT], AnswerLimits()))[0].text == "B"
        with pytest.raises(CandidateLost, match="--by answer"):
            await candidate.next_logprobs([CHAT], [LETTERS])
        with pytest.raises(CandidateLost, match="--tokenizer"):
            await candidate.loglikelihoods([CHAT], ["yes"])


async def test_letters_of_a_server_that_puts_its_own_token_first(plain_server: Callable[[Reply], str]) -> None:
    """As vLLM does; here it writes C, which then stands before A and B."""
    values = {"C": -0.5, "A": -1.0, "B": -2.0, "D": -3.0}

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path == "/tokenize":
            return 200, {}, {"tokens": [ord(letter) for letter in body["prompt"]]}
        if body["messages"][0]["content"] == "long":
            return 400, {}, {"error": {"message": "too long"}}
        entries = [{"token": letter, "logprob": value} for letter, value in values.items()]
        return (
            200,
            {},
            {"choices": [{"message": {"content": "C"}, "logprobs": {"content": [{"top_logprobs": entries}]}}]},
        )

    async with url_candidate(plain_server(reply), patience_s=1) as candidate:
        long = Prompt(messages=({"role": "user", "content": "long"},))
        refused, found = await candidate.next_logprobs([long, CHAT], [LETTERS] * 2)
        assert found.values == (-1.0, -2.0, -0.5, -3.0)
        assert refused.error == "http-400: too long"  # that item's, though it came first


async def test_a_reference_that_does_not_fit_is_that_items_error(plain_server: Callable[[Reply], str]) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path == "/tokenize":
            return 200, {}, {"tokens": [ord(letter) for letter in body["prompt"]]}
        if path != "/v1/completions":
            return 404, {}, {"error": {"message": "no such route"}}
        if len(body["prompt"]) > 99:
            return 400, {}, {"error": {"message": "too long"}}
        shape = {"token_logprobs": [None, *[-1.0] * (len(body["prompt"]) - 1)]}
        return 200, {}, {"choices": [{"text": "", "logprobs": shape}]}

    async with url_candidate(plain_server(reply), patience_s=1) as candidate:
        long, short = await candidate.loglikelihoods([Prompt(text="Q:")] * 2, ["x" * 200, "yes"])
    assert long.error == "http-400: too long" and (short.total, short.num_tokens) == (-3.0, 3)


async def test_a_token_fused_by_the_server_is_the_answers(plain_server: Callable[[Reply], str]) -> None:
    """Its tokens are characters, but `:no` is one."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path == "/tokenize":
            return 200, {}, {"tokens": [ord(letter) for letter in body["prompt"].replace(":no", "#")]}
        if path != "/v1/completions":
            return 404, {}, {"error": {"message": "no such route"}}
        shape = {"token_logprobs": [None, *(-float(token) for token in body["prompt"][1:])]}
        return 200, {}, {"choices": [{"text": "", "logprobs": shape}]}

    question = Prompt(text="Q:")
    async with url_candidate(plain_server(reply), patience_s=1) as candidate:
        (fused,) = await candidate.loglikelihoods([question], ["no!"])
        (letters,) = await candidate.next_logprobs([question], [["no", "yes"]])
        (empty,) = await candidate.next_logprobs([question], [["no", ""]])
    assert (fused.total, fused.num_tokens, fused.num_prompt_tokens) == (-float(ord("#") + ord("!")), 2, 1)
    assert letters.values == (-float(ord("#")), -float(sum(map(ord, ":yes"))))  # both from the colon on
    assert empty.error.startswith("no-tokens")


async def test_a_server_that_is_not_there_is_said_soon() -> None:
    with pytest.raises(CandidateLost, match=r"no answer for .* is the server running\?"):
        async with url_candidate("http://127.0.0.1:9/v1#m", patience_s=0.1):
            pass


async def test_echoed_text_of_a_server_without_token_ids(plain_server: Callable[[Reply], str]) -> None:
    """OpenAI's own shape: offsets tell which of the prompt's tokens are the continuation's."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path != "/v1/completions":
            return 404, {}, {}
        if body["max_tokens"] == 0:
            return 400, {}, {"error": {"message": "max_tokens must be at least 1"}}
        pieces = [body["prompt"][at : at + 3] for at in range(0, len(body["prompt"]), 3)] + ["new"]
        values = [None, *(-float(ord(piece[0])) for piece in pieces[1:])]
        shape = {"token_logprobs": values, "text_offset": [3 * place for place in range(len(pieces))]}
        return 200, {}, {"choices": [{"text": "", "logprobs": shape, "finish_reason": "length"}]}

    async with url_candidate(plain_server(reply), patience_s=1) as candidate:
        found = await candidate.next_logprobs([Prompt(text="abcdef")], [["ghi", "jklm"]])
        assert found[0].values == (-float(ord("g")), -float(ord("j") + ord("m")))
        (fused,) = await candidate.next_logprobs([Prompt(text="abcde")], [["fg"]])
        assert fused.values == (-float(ord("d") + ord("g")),)  # "def" is one token


async def test_a_busy_server_is_waited_for_as_it_asks(plain_server: Callable[[Reply], str]) -> None:
    calls: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        calls.append(path)
        if len(calls) in (2, 3):
            return 503, {"Retry-After": "0.05"}, {"error": {"message": "The queue is full."}}
        return 200, {}, _said("yes")

    async with url_candidate(plain_server(reply), patience_s=5) as candidate:
        assert [a.text for a in await candidate.answers([CHAT], AnswerLimits())] == ["yes"]
    assert len(calls) == 4


async def test_a_refused_key_ends_it(plain_server: Callable[[Reply], str]) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return 401, {}, {"error": {"message": "Incorrect API key provided."}}

    with pytest.raises(CandidateLost, match="OPENAI_API_KEY"):
        async with url_candidate(plain_server(reply), patience_s=1):
            pass


def _asked(name: str) -> Prompt:
    return Prompt(messages=({"role": "user", "content": name},))


def _fails_at(status: int, word: str) -> Reply:
    """A server that fails at what holds `word`, and answers everything else."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if word in body["messages"][0]["content"]:
            return status, {}, {"error": {"message": "not this one"}}
        return 200, {}, _said("yes")

    return reply


@pytest.mark.parametrize("status", [500, 403])
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_an_item_that_the_server_always_fails_at_is_that_items_error(
    plain_server: Callable[[Reply], str], status: int, concurrency: int
) -> None:
    """Also the last one, and one alone: the server still answers what it answered before."""
    url = plain_server(_fails_at(status, "DROP"))
    async with url_candidate(url, patience_s=0.3, concurrency=concurrency) as candidate:
        found = await candidate.answers([_asked("a"), _asked("DROP TABLE"), _asked("b")], AnswerLimits())
        alone = await candidate.answers([_asked("DROP TABLE")], AnswerLimits())
    assert [answer.text for answer in found] == ["yes", "", "yes"]
    assert found[1].error == alone[0].error == f"http-{status}: not this one"


async def test_an_item_that_times_out_is_that_items_error(
    plain_server: Callable[[Reply], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evaluate.url_client.TIMEOUT_S", 0.2)

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if body["messages"][0]["content"] == "long":
            time.sleep(0.5)
        return 200, {}, _said("yes")

    async with url_candidate(plain_server(reply), patience_s=0.3) as candidate:
        found = await candidate.answers([_asked("long"), _asked("a")], AnswerLimits())
    assert found[0].error.startswith("timeout: ") and found[1].text == "yes"


async def test_a_server_that_fails_at_everything_is_lost(plain_server: Callable[[Reply], str]) -> None:
    calls: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        calls.append(path)
        return (200, {}, _said("yes")) if len(calls) < 3 else (500, {}, {"error": {"message": "the engine died"}})

    async with url_candidate(plain_server(reply), patience_s=0.3, concurrency=2) as candidate:
        with pytest.raises(CandidateLost, match=r"no answer for 0\.3 s \(http-500: the engine died\)"):
            await candidate.answers([_asked(name) for name in "abcd"], AnswerLimits())


async def test_a_server_whose_engine_died_is_lost_though_it_still_counts_tokens(
    plain_server: Callable[[Reply], str],
) -> None:
    scored: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path == "/tokenize":
            return 200, {}, {"tokens": [ord(letter) for letter in body["prompt"]]}
        scored.append(path)
        if len(scored) > 3:
            return 500, {}, {"error": {"message": "the engine died"}}
        shape = {"token_logprobs": [None, *[-1.0] * (len(body.get("prompt", "")) - 1)]}
        return 200, {}, {"choices": [{"text": "", "logprobs": shape}]}

    async with url_candidate(plain_server(reply), patience_s=0.3, concurrency=2) as candidate:
        with pytest.raises(CandidateLost, match="http-500: the engine died"):
            await candidate.loglikelihoods([Prompt(text=f"Q{n}:") for n in range(9)], ["yes"] * 9)


async def test_a_busy_server_is_waited_for_as_long_as_it_answers_others(plain_server: Callable[[Reply], str]) -> None:
    """A quota is nobody's fault, and no reason to count a question as wrong."""
    began = time.monotonic()

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if body["messages"][0]["content"] == "starved" and time.monotonic() < began + 1.0:
            return 429, {"Retry-After": "0.05"}, {"error": {"message": "quota"}}
        time.sleep(0.05)
        return 200, {}, _said("yes")

    async with url_candidate(plain_server(reply), patience_s=0.4, concurrency=2) as candidate:
        prompts = [_asked("starved"), *(_asked(f"q{n}") for n in range(25))]
        assert {answer.text for answer in await candidate.answers(prompts, AnswerLimits())} == {"yes"}


async def test_a_model_that_is_unloaded_half_way_is_lost(plain_server: Callable[[Reply], str]) -> None:
    async with url_candidate(plain_server(_fails_at(404, "b")), patience_s=1, concurrency=1) as candidate:
        with pytest.raises(CandidateLost, match=r"does not have the model any more \(not this one\)"):
            await candidate.answers([_asked("a"), _asked("b")], AnswerLimits())


def _known_as(fingerprint: Callable[[], str]) -> Reply:
    """A server of chats and of echoed prompts, whose every reply says what it runs."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if path == "/tokenize":
            return 200, {}, {"tokens": [ord(letter) for letter in body["prompt"]]}
        shape = {"token_logprobs": [None, *[-1.0] * (len(body.get("prompt", "")) - 1)]}
        choice = {**_said("yes")["choices"][0], "logprobs": shape}
        return 200, {}, {"choices": [choice], "system_fingerprint": fingerprint()}

    return reply


async def _answers(candidate: Candidate) -> list[str]:
    return [answer.text for answer in await candidate.answers([_asked(name) for name in "abc"], AnswerLimits())]


async def _likelihoods(candidate: Candidate) -> list[float]:
    return [found.total for found in await candidate.loglikelihoods([Prompt(text="Q:")] * 3, ["yes"] * 3)]


@pytest.mark.parametrize("ask", [_answers, _likelihoods])
async def test_a_name_that_is_moved_half_way_is_lost(
    plain_server: Callable[[Reply], str], ask: Callable[[Candidate], Any]
) -> None:
    said = itertools.chain(["fp_a"] * 4, itertools.repeat("fp_b"))
    async with url_candidate(plain_server(_known_as(lambda: next(said))), patience_s=1, concurrency=1) as candidate:
        assert candidate.info.fingerprint == "fp_a"
        with pytest.raises(CandidateChanged, match=r"#m: serves something else .*fp_a, now fp_b\); .*#name@revision"):
            await ask(candidate)


async def test_a_fingerprint_that_is_never_the_same_is_none(plain_server: Callable[[Reply], str]) -> None:
    count = itertools.count()
    url = plain_server(_known_as(lambda: f"fp_{next(count)}"))
    async with url_candidate(url, patience_s=1, concurrency=1) as candidate:
        assert candidate.info.fingerprint == "" and await _answers(candidate) == ["yes"] * 3


async def test_a_fingerprint_that_comes_back_says_nothing_of_the_weights(plain_server: Callable[[Reply], str]) -> None:
    said = itertools.chain(["fp_a"] * 3, itertools.cycle(["fp_b", "fp_c", "fp_a"]))
    async with url_candidate(plain_server(_known_as(lambda: next(said))), patience_s=1, concurrency=1) as candidate:
        assert candidate.info.fingerprint == "fp_a" and await _answers(candidate) == ["yes"] * 3


async def test_what_was_answered_by_other_weights_is_not_gone_on_with(
    plain_server: Callable[[Reply], str], tmp_path: Path
) -> None:
    """But it is when the name means again what it meant."""
    said = itertools.chain(["fp_a"] * 5, itertools.repeat("fp_b", 1 + LOOKS + 2), itertools.repeat("fp_a"))
    url = plain_server(_known_as(lambda: next(said)))
    settings = EvalSettings(max_tokens=4)
    task = BbhTask("bbh/bench", [text(f"q{n}", "yes") for n in range(6)], settings)

    async def run() -> Any:
        async with url_candidate(url, patience_s=1, concurrency=1) as candidate:
            return await evaluate(candidate, [task], tmp_path, settings, shows_progress=False)

    with pytest.raises(CandidateLost, match=r"3 of 6 items are kept .*; they count only if the name means that again"):
        await run()
    with pytest.raises(DriftError, match=r"candidate\.fingerprint: .*fp_a.*, now .*fp_b"):
        await run()
    result = await run()
    assert result.tasks[0].num_scored == 6 and result.speed["num_items"] == 3


@pytest.mark.e2e
async def test_a_revision_stays_what_it_is_when_its_name_is_moved(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(workers=1, adapter_roots=tmp_path, max_adapter_rank=8)

    def publish(seed: int) -> str:
        path = str(write_folder(tmp_path / str(seed), seed))
        added = httpx.post(f"{service.url}/v1/adapters", json={"name": "friend", "path": path}, timeout=30)
        return str(added.raise_for_status().json()["id"])

    first = publish(1)
    async with (
        url_candidate(f"{service.url}/v1#friend") as by_name,
        url_candidate(f"{service.url}/v1#{first}") as by_revision,
    ):
        assert by_name.info.fingerprint == by_revision.info.fingerprint != ""
        assert await asyncio.to_thread(publish, 2) != first
        assert len(await by_revision.answers([CHAT], AnswerLimits(max_tokens=4))) == 1
        with pytest.raises(CandidateChanged):
            await by_name.answers([CHAT], AnswerLimits(max_tokens=4))
