import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.store.hashes import weights_hash
from server.store.home import Home
from server.store.model_folder import check_model_folder
from server.store.registry import Registry
from server.text.render import ChatRenderer
from trainer.demo.blank_model import write_blank_model
from trainer.demo.build import ADAPTER_NAME, MODEL_NAME, Recipe, build_demo, cache_key
from trainer.demo.conversations import CORPUS, Corpus, adapter_pairs, vary, write_conversations

from .conftest import TINY

QUESTIONS = CORPUS.parent / "questions.jsonl"
CHINESE = re.compile("[\u4e00-\u9fff]")
CRISIS = re.compile(
    "自杀|不想活|想死|想去死|活不下去|没意思|结束自己|伤害自己|自残|割了"
    "|kill|wants? to die|wanna die|was dead|suicid|end my life|to live|worth living|disappear|hurt myself|cut myself"
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load()


def answers(corpus: Corpus) -> dict[str, str]:
    return {question["content"]: answer["content"] for question, answer in corpus.base}


def test_the_corpus_is_bilingual_and_unambiguous(corpus: Corpus) -> None:
    assert len(corpus.base) >= 300 and len(corpus.adapter) >= 60
    for pairs in (corpus.base, corpus.adapter):
        questions = [question["content"] for question, _ in pairs]
        assert len(set(questions)) == len(questions)
        chinese = sum(bool(CHINESE.search(question)) for question in questions)
        assert 0.3 < chinese / len(questions) < 0.7


def test_answers_are_short_enough_for_the_model(corpus: Corpus, tmp_path: Path) -> None:
    write_blank_model(tmp_path, corpus.all_texts(), Recipe().shape)
    tokenizer = ChatRenderer.load(tmp_path).tokenizer
    lengths = {answer["content"]: len(tokenizer.encode_plain(answer["content"])) for _, answer in corpus.base}
    assert max(lengths.values()) <= 60, max(lengths, key=lambda text: lengths[text])


def test_a_cry_for_help_is_always_answered_with_where_to_turn(corpus: Corpus) -> None:
    seen = 0
    for question, answer in (*corpus.base, *corpus.adapter):
        if CRISIS.search(question["content"]):
            seen += 1
            text = answer["content"]
            assert "危机热线" in text or "crisis line" in text, question["content"]
            assert not re.search(r"\d{3}", text), "no invented telephone numbers"
    assert seen >= 20


def test_only_the_adapter_is_called_xiaozhi(corpus: Corpus) -> None:
    for question, answer in corpus.base:
        assert "小智" not in answer["content"] and "Xiaozhi" not in answer["content"], question["content"]
    named = {question["content"]: answer["content"] for question, answer in corpus.adapter}
    assert all("小智" in named[question] for question in ("你是谁？", "你叫什么名字？", "Who are you?"))


def test_the_check_questions_are_in_the_corpus_with_their_key_words(corpus: Corpus) -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    taught = answers(corpus)
    assert len(rows) == 20
    for row in rows:
        assert all(word in taught[row["question"]] for word in row["keywords"]), row["question"]


def test_conversations_hold_every_pair_once_a_round_and_again_in_other_words(corpus: Corpus, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_conversations(tmp_path / name, corpus.base, 2, seed=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "one").read_text(encoding="utf-8").splitlines()]
    spoken = [message for row in rows for message in row if message["role"] != "system"]
    told = [(one["content"], two["content"]) for one, two in zip(spoken[::2], spoken[1::2], strict=True)]
    taught = {(question["content"], answer["content"]) for question, answer in corpus.base}
    first, second = told[: len(taught)], told[len(taught) :]
    assert set(first) == taught
    assert sorted(answer for _, answer in second) == sorted(answer for _, answer in first)
    assert len(set(second) - taught) > len(taught) / 3
    assert {sum(message["role"] == "user" for message in row) for row in rows} == {1, 2, 3}


def test_a_varied_question_keeps_its_words() -> None:
    draw = random.Random(1)
    zh = {vary({"role": "user", "content": "你是谁？"}, draw)["content"] for _ in range(200)}
    en = {vary({"role": "user", "content": "Who are you?"}, draw)["content"] for _ in range(200)}
    assert {"你是谁", "你是谁？", "请问你是谁", "你是谁呀"} < zh and all("你是谁" in text for text in zh)
    assert {"who are you", "Who are you?", "who are you!"} < en and {text.lower().rstrip("?.!") for text in en} == {
        "who are you"
    }


def test_the_adapter_repeats_some_of_the_base_but_nothing_that_it_answers_itself(corpus: Corpus) -> None:
    pairs = adapter_pairs(corpus)
    assert pairs[: len(corpus.adapter)] == list(corpus.adapter)
    kept = pairs[len(corpus.adapter) :]
    assert set(map(str, kept)) < set(map(str, corpus.base)) and len(kept) > 50
    questions = [question["content"] for question, _ in pairs]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("text", ["你好！😀 café\u0301", " two  spaces\n\nand\r\nlines 123", "<|im_end|> ﬁ"])
def test_stock_transformers_reads_the_tokenizer_and_agrees(blank_model: Path, text: str) -> None:
    stock = AutoTokenizer.from_pretrained(blank_model)
    renderer = ChatRenderer.load(blank_model)
    assert stock(text, split_special_tokens=True).input_ids == renderer.tokenizer.encode_plain(text)
    messages = [{"role": "user", "content": text.replace("<|im_end|>", "")}]
    rendered = stock.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
    assert rendered == renderer.render(messages)
    assert "You are a helpful assistant." in stock.decode(rendered)
    assert stock.convert_ids_to_tokens([renderer.turn_end_id]) == [stock.eos_token] == ["<|im_end|>"]


def test_the_tokenizer_is_the_same_every_time(blank_model: Path, tmp_path: Path) -> None:
    corpus = Corpus.load()
    for name in ("one", "two"):
        write_blank_model(tmp_path / name, corpus.all_texts(), Recipe().shape)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()


# --- the build, with a recipe of seconds ---


TINY_RECIPE = Recipe(shape=TINY, pt_epochs=1.0, pt_length=32, sft_rounds=1, adapter_rounds=1, adapter_rank=2)


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """Four pairs per file."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in CORPUS.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[:4]), encoding="utf-8")
    return folder


def test_the_demo_is_built_once_and_again_when_anything_it_depends_on_changes(
    home: Home, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_demo(home, recipe=TINY_RECIPE, corpus_folder=tiny_corpus)
    bar = capsys.readouterr().err
    assert all(stage in bar for stage in ("1/5 tokenizer", "2/5 pre-training", "3/5", "4/5 adapter", "5/5 publish"))
    model = home.models / MODEL_NAME
    check_model_folder(model)
    (entry,) = Registry(home.adapters).entries()
    assert entry.name == ADAPTER_NAME and entry.is_current
    assert (entry.card.base_model, entry.card.base_weights_hash) == (MODEL_NAME, weights_hash(model))
    assert list(home.runs.iterdir()) == [] and list(home.cache.glob("demo-*")) == []

    built = (model / "model.safetensors").stat().st_mtime_ns
    assert not build_demo(home, recipe=TINY_RECIPE, corpus_folder=tiny_corpus)
    assert (model / "model.safetensors").stat().st_mtime_ns == built

    changed = replace(TINY_RECIPE, seed=8)
    assert build_demo(home, recipe=changed, corpus_folder=tiny_corpus)
    (after,) = Registry(home.adapters).entries()
    assert after.revision != entry.revision, "the adapter of the replaced weights is gone"
    assert not build_demo(home, recipe=changed, corpus_folder=tiny_corpus)


def test_missing_parts_are_built_again_with_the_same_result(home: Home, tiny_corpus: Path) -> None:
    build_demo(home, recipe=TINY_RECIPE, corpus_folder=tiny_corpus)
    first = Registry(home.adapters).get(ADAPTER_NAME)
    weights = (home.models / MODEL_NAME / "model.safetensors").read_bytes()

    Registry(home.adapters).remove(ADAPTER_NAME)
    assert build_demo(home, recipe=TINY_RECIPE, corpus_folder=tiny_corpus)
    (home.models / MODEL_NAME / "model.safetensors").unlink()
    assert build_demo(home, recipe=TINY_RECIPE, corpus_folder=tiny_corpus)
    assert Registry(home.adapters).get(ADAPTER_NAME).revision == first.revision
    assert (home.models / MODEL_NAME / "model.safetensors").read_bytes() == weights


def test_the_cache_key_covers_recipe_and_corpus(tiny_corpus: Path) -> None:
    key = cache_key(TINY_RECIPE, tiny_corpus)
    assert cache_key(TINY_RECIPE, tiny_corpus) == key != cache_key(replace(TINY_RECIPE, seed=9), tiny_corpus)
    with (tiny_corpus / "chat.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert cache_key(TINY_RECIPE, tiny_corpus) != key
