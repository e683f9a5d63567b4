"""`run_now` against an ordinary task: the same results, whether or not there was something to wait for."""

import asyncio

import pytest

from server.api.eager import run_now


async def test_without_waiting_it_is_done_at_once_and_makes_no_task() -> None:
    seen = []

    async def work() -> None:
        seen.append(1)

    assert run_now(work()) is None
    assert seen == [1]


async def test_waiting_goes_on_in_a_task() -> None:
    gate, seen = asyncio.Event(), []

    async def work() -> None:
        await gate.wait()
        await asyncio.sleep(0)
        seen.append(1)

    task = run_now(work())
    assert task is not None and seen == []
    gate.set()
    await task
    assert seen == [1]


async def test_an_error_before_waiting_is_raised_and_one_after_it_is_the_tasks() -> None:
    async def early() -> None:
        raise ValueError

    async def late() -> None:
        await asyncio.sleep(0)
        raise ValueError

    with pytest.raises(ValueError):
        run_now(early())
    task = run_now(late())
    assert task is not None
    with pytest.raises(ValueError):
        await task


async def test_a_cancelled_task_cancels_the_coroutine() -> None:
    seen = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cleaned up")

    task = run_now(work())
    assert task is not None
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]
