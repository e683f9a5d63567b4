"""Asks a model through OpenAI's API about many rows: several at a time, JSON only, no answer asked for twice.

Knows no rows: a question is a list of messages, an answer a JSON object that the caller's check accepts.
"""

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import openai

from trainer.errors import TrainerError

Messages = list[dict[str, str]]
Item = TypeVar("Item")
SERVER_RETRIES = 4  # by the SDK, for 429, 5xx and lost connections, with growing pauses
_AHEAD = 4  # questions in flight or answered but not yet taken, per question in flight


class AnswerRefused(ValueError):
    """Why an answer cannot be used; told to the model when it is asked again, and to the ledger in the end."""


@dataclass(frozen=True)
class Asked(Generic[Item]):
    """One item and what came of it: the checked answer, or why there is none."""

    item: Item
    answer: Any = None
    refusal: str | None = None


class Journal:
    """Answers on disk as they come, so that a stopped command does not pay for them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # JSON lets U+2028 stand
                self._take(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.write("\n")  # a line that a kill has torn ends here

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any:
        return self._answers.get(key)

    def add(self, key: str, answer: Any) -> None:
        with self._lock:
            self._file.write(json.dumps([key, answer], ensure_ascii=False) + "\n")

    def close(self, *, remove: bool) -> None:
        self._file.close()
        if remove:
            self.path.unlink()

    def _take(self, line: str) -> None:
        try:
            key, answer = json.loads(line)
        except ValueError:
            return  # the last line of a process that was killed while writing it
        self._answers[key] = answer


class Asker:
    """One model behind one URL. Any thread may ask."""

    def __init__(
        self, url: str, model: str, api_key: str | None, journal: Journal, *, max_tokens: int, tries: int = 3
    ) -> None:
        """`max_tokens`: longest answer; `tries`: how often one item is asked about until the answer can be used."""
        self.model = model
        self._max_tokens = max_tokens
        self._url = url
        self._tries = tries
        self._journal = journal
        self.num_refused = 0  # items without a usable answer
        # A server without keys wants none, but the SDK does not start without one.
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=SERVER_RETRIES)

    def ask_all(
        self,
        items: Iterable[Item],
        prompt: Callable[[Item], Messages],
        check: Callable[[Item, Any], Any],
        *,
        concurrency: int,
        temperature: float,
    ) -> Iterator[Asked[Item]]:
        """Ask about each item, at most `concurrency` at a time; results in the order of the items.

        `check` turns the JSON value of an answer into what is wanted, or raises AnswerRefused. Raises TrainerError when
        the server cannot be used at all.
        """

        def one(item: Item) -> Asked[Item]:
            if failed.is_set():
                raise TrainerError(f"{self._url}: given up{_KEPT}")
            try:
                return self._ask(item, prompt(item), check, temperature)
            except TrainerError:
                failed.set()  # what waits behind this item is not asked any more
                raise

        failed = threading.Event()
        waiting: deque[Future[Asked[Item]]] = deque()
        pool = ThreadPoolExecutor(concurrency)
        try:
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) >= concurrency * _AHEAD:
                    yield self._counted(waiting.popleft().result())
            while waiting:
                yield self._counted(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)  # answers on their way are waited for, and kept

    def _counted(self, asked: Asked[Item]) -> Asked[Item]:
        self.num_refused += asked.refusal is not None
        return asked

    def _ask(
        self, item: Item, messages: Messages, check: Callable[[Item, Any], Any], temperature: float
    ) -> Asked[Item]:
        key = _key(self.model, messages, temperature)
        kept = self._journal.get(key)
        if kept is not None:
            return Asked(item, check(item, kept))
        reason = ""
        for _ in range(self._tries):
            try:
                said = self._complete(messages, temperature)
                value = _json(said)
                answer = check(item, value)
            except openai.BadRequestError as error:
                return Asked(item, refusal=f"the server refused the question: {_why(error)}")
            except AnswerRefused as refused:
                reason = str(refused)
                again = f"That cannot be used: {reason}. Answer again, with the JSON object and nothing else."
                messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": again}]
                continue
            self._journal.add(key, value)
            return Asked(item, answer)
        return Asked(item, refusal=f"{reason} ({self._tries} tries)")

    def _complete(self, messages: Messages, temperature: float) -> str:
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # plain dicts, as the SDK sends them
                temperature=temperature,
                max_tokens=self._max_tokens,
            )
        except openai.BadRequestError:
            raise
        except openai.APIStatusError as error:
            hint = "; set OPENAI_API_KEY" if error.status_code == 401 else ""
            raise TrainerError(f"{self._url}: HTTP {error.status_code}: {_why(error)}{hint}{_KEPT}") from None
        except openai.APIConnectionError as error:
            raise TrainerError(f"{self._url}: cannot be reached ({error.__cause__ or error}){_KEPT}") from None
        return (completion.choices[0].message.content or "") if completion.choices else ""


_KEPT = "; answers so far are kept, the same command goes on from there"


def _why(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:300]


def _json(said: str) -> Any:
    """The object of an answer; a Markdown fence around it is forgiven. Raises AnswerRefused."""
    text = said.strip()
    if text.startswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    try:
        value = json.loads(text)
    except ValueError:
        raise AnswerRefused("the answer is not JSON" if text else "the answer is empty") from None
    if not isinstance(value, dict):
        raise AnswerRefused("the answer is not a JSON object")
    return value


def _key(model: str, messages: Messages, temperature: float) -> str:
    asked = json.dumps([model, messages, temperature], ensure_ascii=False)
    return hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
