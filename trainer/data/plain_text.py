"""Plain text files -> dialogues (`来访者：…`) or documents. Knows speakers' names, not rows."""

import re
from collections.abc import Iterator
from typing import TextIO

from trainer.data.json_values import LONGEST, Found
from trainer.data.roles import spoken
from trainer.data.rows import Note

_RULE = re.compile(r"\s*(?:-{3,}|={3,}|\*{3,})\s*")
_DOCUMENT = 1 << 20  # characters; a longer one is cut at a line's end
HEADING = Note("heading-dropped", "text before the first speaker is left out")


def is_dialogue(head: str) -> bool:
    """Whether both sides speak, each at the start of a line."""
    found = [turn[0] for turn in map(spoken, head.splitlines()) if turn]
    return "user" in found and "assistant" in found


def dialogue_values(stream: TextIO) -> Iterator[Found]:
    """One conversation per file, or per part between lines of `---`; a turn goes on until the next speaker."""
    turns: list[tuple[str, list[str]]] = []
    start, heading = 1, False
    for number, line in enumerate(_lines(stream), 1):
        said = spoken(line)
        if said:
            turns.append((said[0], [said[1]]))
        elif _RULE.fullmatch(line):
            if turns:
                yield _dialogue(start, turns, heading)
            turns, start, heading = [], number + 1, False
        elif turns:
            turns[-1][1].append(line)
        elif line.strip():
            heading = True
    if turns:
        yield _dialogue(start, turns, heading)


def document_values(stream: TextIO) -> Iterator[Found]:
    """Documents are parted by empty lines."""
    lines: list[str] = []
    start, size = 1, 0
    for number, line in enumerate(_lines(stream), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip("\r\n"))
            size += len(line)
        if lines and (not line.strip() or size > _DOCUMENT):
            yield Found(start, {"text": "\n".join(lines)})
            lines, size = [], 0
    if lines:
        yield Found(start, {"text": "\n".join(lines)})


def _dialogue(start: int, turns: list[tuple[str, list[str]]], heading: bool) -> Found:
    messages = [{"role": role, "content": "\n".join(map(str.rstrip, lines)).strip()} for role, lines in turns]
    return Found(start, {"messages": messages}, (HEADING,) if heading else ())


def _lines(stream: TextIO) -> Iterator[str]:
    while line := stream.readline(LONGEST):
        yield line
