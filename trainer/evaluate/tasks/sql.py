"""Questions about a database: the answer's query must give what the right one gives."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.store.hashes import file_hash
from trainer.evaluate.candidate import Answer, AnswerLimits, Candidate, Prompt
from trainer.evaluate.items import RefusedItem, SqlItem
from trainer.evaluate.results import ItemScore
from trainer.evaluate.scores.sql import PASSING, gold_faults, query_in, sql_score
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Emit, Task, answer_details, failed, is_plain

ASK = "Write one SQLite query that answers the question. Give the query only."
PLAIN_STOP = (";", "\n\n")
MAX_BROKEN = 20  # items that are named in the notes
UNDECIDED = frozenset(f"gold-{code}" for code in PASSING)  # outcomes that say nothing of the answer


class SqlTask(Task[SqlItem]):
    """Items without a database, and items none of whose own queries runs, cannot be scored and are counted apart.

    Right queries are run of those items only that the limit draws. One that does not end in time decides nothing: else
    a busy machine would ask other items than an idle one.
    """

    kind = "sql"
    main_metric = "execution_accuracy"

    def __init__(
        self, name: str, items: Sequence[SqlItem], settings: EvalSettings, refused: Sequence[RefusedItem] = ()
    ) -> None:
        bare = [_refused(item, "no-database", "only a schema came with it") for item in items if item.database is None]
        sound = sorted((item for item in items if item.database is not None), key=lambda item: item.subject)
        super().__init__(name, sound, settings, [*refused, *bare])
        broken = {item.item_id: fault for item in self.items if (fault := _fault(item)) is not None}
        self.items = [item for item in self.items if item.item_id not in broken]
        self.refused.update(each.code for each in broken.values())
        self._hashes = {path: file_hash(path) for path in {item.database for item in self.items} if path}
        self._broken = [f"{Path(one.source).name}:{one.line}: {one.detail}" for one in broken.values()]

    async def ask(self, candidate: Candidate, items: Sequence[SqlItem], emit: Emit) -> None:
        plain = is_plain(self.settings, candidate)
        prompts = [self._prompt(item, plain) for item in items]
        stop = PLAIN_STOP if plain else ()
        limits = AnswerLimits(self.settings.max_tokens, self.settings.temperature, stop, self.settings.seed)
        answers: asyncio.Queue[tuple[int, Answer] | None] = asyncio.Queue()
        scoring = asyncio.create_task(self._score_all(items, prompts, plain, answers, emit))
        try:
            await candidate.answers(prompts, limits, lambda place, answer: answers.put_nowait((place, answer)))
        finally:
            answers.put_nowait(None)
            await scoring

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        outcomes = Counter(str(score.details.get("outcome", "error")) for score in scores)
        broken = {"broken": self._broken[:MAX_BROKEN]} if self._broken else {}
        return {"outcomes": dict(outcomes), "limit_s": 5.0, "access": "read-only", **broken}

    def _content(self, item: SqlItem) -> dict[str, Any]:
        """With what the database holds in place of its path: other rows give other scores."""
        assert item.database is not None  # the others are refused
        return super()._content(item) | {"database": self._hashes[item.database]}

    def _prompt(self, item: SqlItem, plain: bool) -> Prompt:
        group = f"{item.benchmark}/{item.subject}"
        if plain:
            return Prompt(text=f"{item.schema}\n\n-- {ASK}\n-- {item.question}\nSELECT", group=group)
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        asked = {"role": "user", "content": f"{item.schema}\n\n{ASK}\n{item.question}"}
        return Prompt(messages=(*system, asked), group=group)

    async def _score_all(
        self,
        items: Sequence[SqlItem],
        prompts: Sequence[Prompt],
        plain: bool,
        answers: "asyncio.Queue[tuple[int, Answer] | None]",
        emit: Emit,
    ) -> None:
        """In a thread, as a query may take seconds, and meanwhile the candidate goes on."""
        while (found := await answers.get()) is not None:
            place, answer = found
            text = f"SELECT{answer.text}" if plain else answer.text
            emit(await asyncio.to_thread(self._item_score, items[place], answer, text))

    def _item_score(self, item: SqlItem, answer: Answer, text: str) -> ItemScore:
        score, outcome = (0.0, "") if answer.error else sql_score(item, text)
        error = answer.error or (f"{outcome}: the right query did not end" if outcome in UNDECIDED else "")
        if error:
            zero = {} if outcome in UNDECIDED else {self.main_metric: 0.0}
            return failed(self.name, item, item.question, error, zero, item.queries[0])
        return ItemScore(
            item_id=item.item_id,
            task=self.name,
            subject=item.subject,
            scores={self.main_metric: score},
            prompt=item.question,
            answer=text,
            reference=item.queries[0],
            details={"outcome": outcome, "query": query_in(text) or "", **answer_details(answer)},
        )


def _fault(item: SqlItem) -> RefusedItem | None:
    """Why it cannot be scored, today or ever."""
    faults = gold_faults(item)
    if len(faults) < len(item.queries) or any(fault.code in PASSING for fault in faults.values()):
        return None
    return _refused(item, "gold-failed", "; ".join(f"{fault.code}: {fault.detail}" for fault in faults.values()))


def _refused(item: SqlItem, code: str, detail: str) -> RefusedItem:
    return RefusedItem(benchmark=item.benchmark, source=item.source, line=item.line, code=code, detail=detail)
