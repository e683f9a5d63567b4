"""How many prompt tokens a step computes: all there is time for, few while others stream, more when a crowd waits."""

from pathlib import Path

from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.backends.hf.scheduler import Budget
from tests.server.engine.backends.driver import ask, submit

BUDGET = Budget(idle=48, crowd=24, busy=4, far=10**18)


def start(model_folder: Path) -> HfBackend:
    made = HfBackend(HfOptions(model_folder, "tiny", dtype="fp32", kv_cache_gib=0.05, prefix_cache=False))
    made.load()
    made._scheduler.budget = BUDGET
    return made


def prompt_tokens(backend: HfBackend) -> int:
    """Of one more step."""
    before = backend.stats.prompt_tokens_total
    backend.step()
    return backend.stats.prompt_tokens_total - before


def stream(backend: HfBackend, count: int) -> None:
    submit(backend, *(ask([i], f"stream{i}", max_tokens=200, ignore_eos=True) for i in range(count)))
    backend.step()


def prompts(backend: HfBackend, count: int, length: int = 30) -> None:
    asked = (
        ask([(i + 7 * k) % 250 for k in range(length)], f"prompt{i}", max_tokens=200, ignore_eos=True)
        for i in range(count)
    )
    submit(backend, *asked)


def test_alone_a_prompt_takes_the_whole_step(model_folder: Path) -> None:
    backend = start(model_folder)
    prompts(backend, 2)
    assert [prompt_tokens(backend), prompt_tokens(backend)] == [BUDGET.idle, BUDGET.busy]
    backend.close()


def test_a_few_newcomers_do_not_hold_up_many_streams(model_folder: Path) -> None:
    backend = start(model_folder)
    stream(backend, 5)
    prompts(backend, 5, length=6)  # as many as stream: no majority
    assert [prompt_tokens(backend) for _ in range(3)] == [BUDGET.busy] * 3
    backend.close()


def test_a_crowd_of_newcomers_gets_larger_steps_until_it_is_the_minority(model_folder: Path) -> None:
    backend = start(model_folder)
    stream(backend, 2)
    prompts(backend, 4)
    taken = [prompt_tokens(backend) for _ in range(8)]
    # Two streams, and three of four prompts to go after 48 tokens; then three streams and three: no majority any more.
    assert taken[:3] == [BUDGET.crowd, BUDGET.crowd, BUDGET.busy]
    assert set(taken[3:]) == {BUDGET.busy}
    backend.close()
