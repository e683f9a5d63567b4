"""An adapter's name moves while people talk to it: is every request answered whole, and when do the answers change?

    python -m benchmarks.name_moves MODEL --move "python -m trainer rollback MODEL" [--move …] [--url URL]

16 clients of the OpenAI SDK ask the same question over and over, as streams, without retries. Each `--move` is a
command; they run one after the other, with `--pause` seconds of load before, between and after. Which revision answered
is told by `system_fingerprint`. Exit status 1 when a request failed, a command did, or answers of the revision before
began more than two seconds after a command's end.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import openai

MAX_SWITCH_S = 2.0
QUESTION = "你是谁？"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request: when it began and ended, by time.monotonic(), and what came."""

    begun: float
    ended: float
    fingerprint: str
    answer: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Move:
    command: str
    begun: float
    done: float
    status: int
    output: str


@dataclass(frozen=True)
class Load:
    """Everything that was asked, and the moves made meanwhile."""

    asked: list[Asked]
    moves: list[Move]

    @property
    def failed(self) -> list[Asked]:
        return [one for one in self.asked if one.error]

    def answering(self, begin: float, end: float) -> set[str]:
        """Fingerprints of the requests that began in this time."""
        return {one.fingerprint for one in self.asked if begin <= one.begun < end and not one.error}

    def switch_s(self, place: int) -> float:
        """From the end of a move to the last request that what it moved away from still answered, in seconds.

        inf where the next move (or the end) came with requests still answered so, or where nothing changed.
        """
        move, end = self.moves[place], self.moves[place + 1].begun if place + 1 < len(self.moves) else float("inf")
        after = sorted((one for one in self.asked if move.done <= one.begun < end), key=lambda one: one.begun)
        old = self.answering(self.moves[place - 1].done + MAX_SWITCH_S if place else 0.0, move.begun)
        if not after or after[-1].fingerprint in old:
            return float("inf")
        return max((one.begun - move.done for one in after if one.fingerprint in old), default=0.0)


async def load_while_moving(
    url: str, model: str, moves: Sequence[str], *, question: str = QUESTION, streams: int = 16, pause_s: float = 5.0
) -> Load:
    """Keep `streams` requests running on `model` of `url` (with /v1) while the commands `moves` run in turn."""
    asked: list[Asked] = []
    over = asyncio.Event()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def caller() -> None:
            while not over.is_set():
                asked.append(await _ask(client, model, question))

        callers = [asyncio.create_task(caller()) for _ in range(streams)]
        made = []
        for command in moves:
            await asyncio.sleep(pause_s)
            made.append(await _run(command))
        await asyncio.sleep(pause_s)
        over.set()
        await asyncio.gather(*callers)
    return Load(asked, made)


async def _ask(client: openai.AsyncOpenAI, model: str, question: str) -> Asked:
    begun, fingerprint, answer, reasons = time.monotonic(), "", "", []
    error = ""
    try:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], stream=True, temperature=0, max_tokens=64
        )
        async for chunk in stream:
            fingerprint = chunk.system_fingerprint or fingerprint
            for choice in chunk.choices:
                answer += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
        error = "" if len(reasons) == 1 else f"ended {len(reasons)} times"
    except openai.OpenAIError as failure:
        error = repr(failure)
    return Asked(begun=begun, ended=time.monotonic(), fingerprint=fingerprint, answer=answer, error=error)


async def _run(command: str) -> Move:
    begun = time.monotonic()
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*shlex.split(command), stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    return Move(
        command=command,
        begun=begun,
        done=time.monotonic(),
        status=process.returncode or 0,
        output=output.decode("utf-8", "replace").strip(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.name_moves", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="the adapter's name")
    parser.add_argument("--move", action="append", required=True, metavar="COMMAND", help="run under load, in turn")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--pause", type=float, default=5.0, metavar="SECONDS", help="load before, between and after")
    options = parser.parse_args(argv)
    load = asyncio.run(
        load_while_moving(
            options.url,
            options.model,
            options.move,
            question=options.question,
            streams=options.streams,
            pause_s=options.pause,
        )
    )
    print("\n".join(_lines(load)))
    moved = all(move.status == 0 and load.switch_s(place) <= MAX_SWITCH_S for place, move in enumerate(load.moves))
    return int(bool(load.failed) or not moved)


def _lines(load: Load) -> list[str]:
    start = min(one.begun for one in load.asked)
    lines = []
    for place, move in enumerate(load.moves):
        lines += [f"{move.done - start:6.1f} s  {move.command}  (exit {move.status})", f"          {move.output}"]
        lines.append(f"          the last answer of the revision before began {load.switch_s(place):.2f} s later")
    for fingerprint in dict.fromkeys(one.fingerprint for one in load.asked if not one.error):
        own = [one for one in load.asked if one.fingerprint == fingerprint and not one.error]
        texts = dict.fromkeys(one.answer for one in own)
        lines.append(f"{len(own):6} answers of {fingerprint}: {' | '.join(texts)}")
    lines += [f"failed: {one.error}" for one in load.failed[:5]]
    return [*lines, f"{len(load.asked)} requests, {len(load.failed)} failed"]


if __name__ == "__main__":
    sys.exit(main())
