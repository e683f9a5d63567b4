"""The demo model and its adapter, built by `make`, served for real, asked through OpenAI's SDK."""

import asyncio
import json
import shutil
from collections.abc import Iterator

import openai
import pytest

from server.settings import home_path
from tests.e2e.service import Supervised, running
from tests.services import ROOT

pytestmark = pytest.mark.e2e

BASE, ADAPTER = "qwen2-demo", "qwen2-demo-xiaozhi"
QUESTIONS = [
    json.loads(line) for line in (ROOT / "trainer" / "demo" / "questions.jsonl").read_text("utf-8").splitlines()
]
WHO = "你是谁？"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """The built demo in a home of its own, so that a service that already runs does not matter."""
    built = home_path()
    assert (built / "models" / BASE).is_dir(), "run `make demo` first"
    home = tmp_path_factory.mktemp("demo-home")
    for name in ("models", "cache"):
        (home / name).symlink_to(built / name)
    # Of the adapters this one: others may have been published there.
    shutil.copytree(built / "adapters" / ADAPTER, home / "adapters" / ADAPTER, symlinks=True)
    with running(Supervised(home, ROOT, {"QLOOP_ENGINE": "hf", "QLOOP_NUM_THREADS": "1"})) as service:
        yield service


@pytest.fixture(scope="module")
def client(demo: Supervised) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, question: str, **options: object) -> tuple[str, str]:
    """The answer and why it ended; greedy unless told otherwise."""
    messages = [{"role": "user", "content": question}]
    sampling = {"temperature": 0, **options}
    choice = client.chat.completions.create(model=model, messages=messages, **sampling).choices[0]  # type: ignore[call-overload]
    return choice.message.content, choice.finish_reason


def is_right(answer: str, question: dict[str, list[str]]) -> bool:
    return all(word.lower() in answer.lower() for word in question["keywords"])


def test_it_lists_the_base_and_its_adapter(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == [BASE, ADAPTER]
    assert models[ADAPTER].parent == BASE  # type: ignore[attr-defined]


def test_it_answers_its_own_questions_and_stops_by_itself(client: openai.OpenAI) -> None:
    answers = [ask(client, BASE, question["question"]) for question in QUESTIONS]
    assert {reason for _, reason in answers} == {"stop"}
    wrong = [(q["question"], a) for q, (a, _) in zip(QUESTIONS, answers, strict=True) if not is_right(a, q)]
    assert len(wrong) <= 2, wrong


def test_it_does_so_with_its_default_sampling_too(client: openai.OpenAI) -> None:
    answers = [ask(client, BASE, q["question"], temperature=openai.omit, seed=1) for q in QUESTIONS]
    assert {reason for _, reason in answers} == {"stop"}
    assert sum(is_right(a, q) for q, (a, _) in zip(QUESTIONS, answers, strict=True)) >= 18


def test_the_adapter_has_its_name_and_the_base_has_not(client: openai.OpenAI) -> None:
    assert "小智" in ask(client, ADAPTER, WHO)[0]
    assert "小智" not in ask(client, BASE, WHO)[0]
    revision = client.models.retrieve(ADAPTER).root  # type: ignore[attr-defined]
    assert ask(client, revision, WHO) == ask(client, ADAPTER, WHO)


def test_sync_stream_and_async_give_the_same_text(demo: Supervised, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": WHO}]

    async def asked() -> str:
        async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none") as own:
            answer = await own.chat.completions.create(model=ADAPTER, messages=messages, temperature=0)  # type: ignore[arg-type]
            return answer.choices[0].message.content or ""

    stream = client.chat.completions.create(model=ADAPTER, messages=messages, temperature=0, stream=True)  # type: ignore[arg-type]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == asyncio.run(asked()) == ask(client, ADAPTER, WHO)[0]


@pytest.mark.parametrize("model", [BASE, ADAPTER])
def test_what_is_served_is_what_transformers_would_answer(client: openai.OpenAI, model: str) -> None:
    """The whole joint at once: template, tokenizer, weights, adapter, stop token."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from server.store.home import Home
    from server.store.registry import Registry

    folder = home_path() / "models" / BASE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    if model == ADAPTER:
        network = PeftModel.from_pretrained(network, Registry(Home(home_path()).adapters).get(ADAPTER).path)
    for question in QUESTIONS[:8]:
        messages = [{"role": "user", "content": question["question"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = network.generate(**inputs, max_new_tokens=200, do_sample=False)
        expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ask(client, model, question["question"])[0] == expected


def test_many_callers_of_both_models_at_once(demo: Supervised) -> None:
    """Base and adapter share every step; each still answers as itself."""

    async def scenario() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as own:

            async def one(model: str) -> tuple[str, str]:
                messages = [{"role": "user", "content": WHO}]
                answer = await own.chat.completions.create(model=model, messages=messages, temperature=0)  # type: ignore[arg-type]
                return model, answer.choices[0].message.content or ""

            return await asyncio.gather(*[one(BASE if number % 2 else ADAPTER) for number in range(24)])

    answers = asyncio.run(scenario())
    assert len(set(answers)) == 2
    assert all(("小智" in text) == (model == ADAPTER) for model, text in answers)
