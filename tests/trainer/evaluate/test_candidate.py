"""Order is kept, requests are bounded, a failure is one item's; and an engine's figures are transformers' own."""

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.store.home import Home
from trainer.evaluate.candidate import (
    Answer,
    AnswerLimits,
    Candidate,
    ItemFailed,
    Loglikelihood,
    Logprobs,
    Prompt,
    pilots_first,
)
from trainer.evaluate.engine_candidate import engine_candidate
from trainer.evaluate.results import CandidateInfo

PLAIN = Prompt(text="The following are questions.\n\n你好，很高兴见到你。\nA. 你\nB. 我\nAnswer:")
CHAT = Prompt(messages=({"role": "user", "content": "你是谁？\nA. demo\nB. assistant\n答案："},))
SPACED = [" A", " B", " C", " D"]
LETTERS = ["A", "B", "C", "D"]
PHRASES = ["我是演示助手。", "I am a demo assistant.", "X"]
REFERENCE = "我是演示助手，很高兴。"


class Slow(Candidate):
    """Counts how many are under way at a time; every third one fails."""

    def __init__(self) -> None:
        self.info = CandidateInfo(name="slow", kind="engine", model="slow")
        self.max_in_flight = 4
        self.running = self.most = 0
        self.begun: list[str] = []

    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        self.begun.append(prompt.text)
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(1 + len(self.begun) % 5):
            await asyncio.sleep(0)
        self.running -= 1
        if prompt.text.endswith("3"):
            raise ItemFailed("too-long: by far")
        return Answer(prompt.text.upper(), "stop")

    async def _next_logprobs(self, prompt: Prompt, continuations: Sequence[str]) -> Logprobs:
        raise ZeroDivisionError

    async def _loglikelihood(self, prompt: Prompt, reference: str) -> Loglikelihood:
        raise NotImplementedError


async def test_order_is_kept_and_a_failure_is_one_items() -> None:
    slow = Slow()
    heard: list[int] = []
    prompts = [Prompt(text=f"a{n}") for n in range(20)]
    found = await slow.answers(prompts, AnswerLimits(), lambda place, answer: heard.append(place))
    assert [answer.text for answer in found] == ["" if n in (3, 13) else f"A{n}" for n in range(20)]
    assert [n for n, answer in enumerate(found) if answer.error == "too-long: by far"] == [3, 13]
    assert sorted(heard) == list(range(20)) and slow.most == 4


async def test_any_other_error_ends_it() -> None:
    with pytest.raises(ZeroDivisionError):
        await Slow().next_logprobs([CHAT] * 9, [LETTERS] * 9)


async def test_one_of_a_group_goes_first() -> None:
    slow = Slow()
    await slow.answers([Prompt(text=f"{group}{n}", group=group) for group in "xyz" for n in range(3)], AnswerLimits())
    assert slow.begun.index("x0") < slow.begun.index("y0") < slow.begun.index("x1")
    for group in "xyz":
        assert slow.begun.index(f"{group}0") < min(slow.begun.index(f"{group}{n}") for n in (1, 2))


def test_every_place_comes_once_behind_its_groups_first() -> None:
    order, firsts = pilots_first(["a", "", "a", "b", "a", "", "b"])
    assert sorted(order) == list(range(7))
    assert firsts == {2: 0, 4: 0, 6: 3}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that asks to be sampled in a way of its own, as Qwen2's do."""
    copy = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "tiny")
    path = copy / "generation_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, "repetition_penalty": 1.5}))
    return copy


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that is asked of one real engine, in one start of it."""
    home = Home(tmp_path_factory.mktemp("home") / "home").create()

    async def ask() -> dict[str, Any]:
        async with engine_candidate(str(folder), home, {"engine": "hf", "hf_dtype": "fp32"}) as candidate:
            long = Prompt(text="你" * 5000)
            return {
                "plain": await candidate.next_logprobs([PLAIN], [SPACED]),
                "chat": await candidate.next_logprobs([CHAT] * 5, [LETTERS] * 5),
                "phrases": await candidate.next_logprobs([PLAIN, CHAT], [PHRASES, PHRASES]),
                "reference": await candidate.loglikelihoods([CHAT, PLAIN, Prompt()], [REFERENCE] * 3),
                "answer": await candidate.answers([CHAT], AnswerLimits(max_tokens=12)),
                "long": await candidate.answers([long, PLAIN], AnswerLimits(max_tokens=2)),
                "long_score": await candidate.next_logprobs([long], [SPACED]),
                "info": candidate.info,
            }

    return asyncio.run(ask())


class Reference:
    """lm-evaluation-harness's method, with transformers alone: encode prompt and continuation as one text, and sum the
    log-softmax of the tokens that reach past the prompt's last character."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, prompt: Prompt) -> str:
        return str(
            self.tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        )

    def sum(self, context: str, continuation: str) -> float:
        found = self.tokenizer(context + continuation, add_special_tokens=False, return_offsets_mapping=True)
        start = next(place for place, (_, end) in enumerate(found["offset_mapping"]) if end > len(context))
        return self.of_ids(found["input_ids"], start)

    @torch.no_grad()
    def of_ids(self, ids: list[int], start: int) -> float:
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logprobs[place - 1, ids[place]] for place in range(start, len(ids))))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference(folder)
    torch.set_num_threads(threads)


def test_letters_as_lm_evaluation_harness_scores_them(found: dict[str, Any], reference: Reference) -> None:
    expected = [reference.sum(PLAIN.text, letter) for letter in SPACED]
    assert found["plain"][0].values == pytest.approx(expected, abs=1e-3)
    expected = [reference.sum(reference.chat(CHAT), letter) for letter in LETTERS]
    for logprobs in found["chat"]:
        assert logprobs.values == pytest.approx(expected, abs=1e-3)


def test_continuations_of_several_tokens(found: dict[str, Any], reference: Reference) -> None:
    for context, logprobs in zip((PLAIN.text, reference.chat(CHAT)), found["phrases"], strict=True):
        assert logprobs.values == pytest.approx([reference.sum(context, each) for each in PHRASES], abs=1e-3)


def test_a_reference_counts_with_the_token_that_ends_it(found: dict[str, Any], reference: Reference) -> None:
    of_chat, of_plain, of_text = found["reference"]
    context = reference.chat(CHAT)
    ids = reference.ids(context + REFERENCE + "<|im_end|>")
    assert of_chat.num_tokens == len(ids) - len(reference.ids(context))
    assert of_chat.total == pytest.approx(reference.of_ids(ids, len(reference.ids(context))), abs=1e-3)
    assert of_plain.total == pytest.approx(reference.sum(PLAIN.text, REFERENCE), abs=1e-3)
    assert of_text.total == pytest.approx(reference.of_ids(reference.ids(REFERENCE), 1), abs=1e-3)
    assert of_text.num_tokens == len(reference.ids(REFERENCE)) - 1


def test_an_answer_is_transformers_greedy_one(found: dict[str, Any], reference: Reference) -> None:
    ids = reference.ids(reference.chat(CHAT))
    made = reference.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    plainly = reference.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=1.0)[
        0, len(ids) :
    ]
    assert made.tolist() != plainly.tolist()  # the model's own penalty shows, as it does where it is served
    answer = found["answer"][0]
    assert answer.text == reference.tokenizer.decode(made, skip_special_tokens=True)
    assert (answer.num_prompt_tokens, answer.num_tokens) == (len(ids), len(made))
    assert answer.finish_reason == ("stop" if len(made) < 12 else "length")


def test_what_does_not_fit_is_that_items_error(found: dict[str, Any]) -> None:
    long, short = found["long"]
    assert long.error.startswith("context_length_exceeded") and not short.error
    assert found["long_score"][0].error.startswith("context_length_exceeded")


def test_the_candidate_says_who_it_is(found: dict[str, Any]) -> None:
    info = found["info"]
    assert (info.kind, info.engine, info.adapter) == ("engine", "hf fp32", "")
    assert len(info.fingerprint) == 16
