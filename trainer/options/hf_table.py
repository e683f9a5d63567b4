"""The argument names of the installed transformers, read from a table, so that no command has to import it.

`python -m trainer.options.hf_table` writes the table anew; a test compares it with the installed version.
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class HfTable:
    """`arguments`: name -> bool, int, float, str or any. The rest: the accepted values of two of them."""

    arguments: dict[str, str]
    schedulers: tuple[str, ...]
    optimizers: tuple[str, ...]


@cache
def hf_table() -> HfTable:
    value = json.loads(TABLE.read_text(encoding="utf-8"))
    return HfTable(value["arguments"], tuple(value["schedulers"]), tuple(value["optimizers"]))


def installed_table() -> dict[str, Any]:
    """The same from the installed transformers; imports it."""
    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    return {
        "arguments": {field.name: _kind(field.type) for field in fields(TrainingArguments)},
        "schedulers": [item.value for item in SchedulerType],
        "optimizers": [item.value for item in OptimizerNames],
    }


def _kind(hint: Any) -> str:
    words = set(getattr(hint, "__name__", str(hint)).replace(" ", "").split("|")) - {"None"}
    return words.pop() if len(words) == 1 and words <= {"bool", "int", "float", "str"} else "any"


if __name__ == "__main__":
    TABLE.write_text(json.dumps(installed_table(), indent=1) + "\n", encoding="utf-8")
