"""Stop strings over streamed text: what may be shown now, what must wait, and where the text ends.

Rule: the stop string that is complete first wins; of several complete at the same character, the longest. So the
result depends on the text alone, never on how it was cut into chunks, and generation ends as early as it can.
"""

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one sequence.

    `matched` is the stop string that ended the text, None until then. With `include`, the text ends with it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Add text; returns what is safe to show. After a match everything more is dropped."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        begin = self._begin_of_held(text)
        self._held = text[begin:]
        return text[:begin]

    def flush(self) -> str:
        """The sequence has ended: what was held back is ordinary text after all."""
        held, self._held = self._held, ""
        return held

    def _begin_of_held(self, text: str) -> int:
        """Where the longest suffix begins that could become a stop string; no stop string is complete in `text`."""
        begin = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < begin:
                if stop.startswith(text[at:]):
                    begin = at
                at = text.find(stop[0], at + 1)
        return begin
