"""What an evaluation left, read back, with the hash that says which answers it were. Knows not how it was made."""

from dataclasses import dataclass
from pathlib import Path

from server.store.hashes import file_hash
from trainer.evaluate.eval_folder import ITEMS, read_result, read_scores
from trainer.evaluate.results import EvalResult, ItemScore


@dataclass(frozen=True)
class Evaluation:
    """One candidate's result and every item's scores."""

    result: EvalResult
    items: tuple[ItemScore, ...]
    items_hash: str  # sha256 of items.jsonl

    @property
    def name(self) -> str:
        return self.result.candidate.name

    def of_task(self, task: str) -> list[ItemScore]:
        return [item for item in self.items if item.task == task]


def read_evaluation(folder: Path) -> Evaluation:
    """Raises ConfigError when the folder holds no finished evaluation."""
    result = read_result(folder)
    return Evaluation(result, tuple(read_scores(folder).values()), file_hash(folder / ITEMS))
