"""BLEU and ROUGE-L against hand-made figures, plain implementations of the papers' formulas, and other libraries."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, brevity_penalty, closest_ref_length, sentence_bleu
from rouge_chinese import Rouge

from trainer.evaluate.bootstrap import paired_statistic_interval, statistic_interval
from trainer.evaluate.scores.corpus import bleu_counts, bleu_of_counts, corpus_bleu
from trainer.evaluate.scores.text import TEXT_METRICS, common_subsequence, rouge_l, text_scores
from trainer.evaluate.scores.words import words

PAIRS = [
    ("我今天很难过，不知道该怎么办。", "我今天非常难过，真的不知道怎么办才好。"),
    ("建议多喝水，注意休息，必要时去医院就诊。", "建议您注意休息，多喝水，如果发热请及时去医院就诊。"),
    ("抑郁症的主要症状是情绪低落和兴趣减退", "抑郁症的核心症状包括情绪低落、兴趣减退和精力下降"),
    ("the cat sat on the mat", "the cat is on the mat today"),
    ("失眠可以通过规律作息改善", "失眠可以通过规律作息改善"),
    ("天气很好", "抑郁症需要专业治疗"),
]


def plain_bleu(found: list[str], expected: list[list[str]], order: int) -> float:
    """Papineni's formula with Chen & Cherry's method 3, written without nltk."""
    logs, misses = [], 0
    for n in range(1, order + 1):
        own = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
        best: Counter[tuple[str, ...]] = Counter()
        for reference in expected:
            best |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        matches, total = sum(min(count, best[gram]) for gram, count in own.items()), max(1, sum(own.values()))
        if n == 1 and not matches:
            return 0.0
        misses += matches == 0
        logs.append(math.log(matches / total if matches else 1 / (2**misses * total)))
    closest = min((len(reference) for reference in expected), key=lambda size: (abs(size - len(found)), size))
    penalty = 1.0 if len(found) > closest else math.exp(1 - closest / len(found))
    return penalty * math.exp(sum(logs) / order)


def plain_subsequence(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]


def test_bleu_by_hand() -> None:
    # the cat sat on mat | the cat on the mat: 1-grams 4/5 (sat misses), 2-grams "the cat" 1/4, 3-grams 0/3,
    # 4-grams 0/2, equal lengths. Smoothed: 3-grams 1/(2·3), 4-grams 1/(4·2).
    scores = text_scores("the cat sat on mat", ["the cat on the mat"])
    assert scores["bleu1"] == pytest.approx(0.8)
    assert scores["bleu2"] == pytest.approx(math.sqrt(0.8 * 0.25))
    assert scores["bleu3"] == pytest.approx((0.8 * 0.25 / 6) ** (1 / 3))
    assert scores["bleu4"] == pytest.approx((0.8 * 0.25 / 6 / 8) ** 0.25)
    # the cat on mat is the longest common subsequence of 5 and 5 words.
    assert scores["rouge_l"] == pytest.approx(0.8)


def test_clipping_counts_a_repeated_word_as_often_as_the_reference_has_it() -> None:
    # The paper's own example: "the" seven times; a reference has it twice.
    answer = " ".join(["the"] * 7)
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert text_scores(answer, references)["bleu1"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("length", "penalty"), [(2, math.exp(1 - 8 / 2)), (4, math.exp(1 - 8 / 4)), (8, 1.0), (12, 1.0)]
)
def test_the_brevity_penalty_is_for_short_answers(length: int, penalty: float) -> None:
    """The penalty by hand, ours and nltk's: below 1 exactly where the answer is shorter than the reference."""
    reference = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    answer = (reference + ["more"] * 4)[:length]
    assert brevity_penalty(closest_ref_length([reference], length), length) == pytest.approx(penalty)
    precision = min(length, 8) / length
    assert text_scores(" ".join(answer), [" ".join(reference)])["bleu1"] == pytest.approx(penalty * precision)


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_bleu_is_nltks_and_the_papers(answer: str, reference: str) -> None:
    other = "另一个参考答案，完全不同。"
    found, expected = words(answer), [words(reference), words(other)]
    scores = text_scores(answer, [reference, other])
    for order in (1, 2, 3, 4):
        assert scores[f"bleu{order}"] == pytest.approx(plain_bleu(found, expected, order), abs=1e-12)
        weights = tuple(1 / order if n < order else 0.0 for n in range(4))
        theirs = sentence_bleu(expected, found, weights, SmoothingFunction().method3)
        assert scores[f"bleu{order}"] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_l_is_rouge_chineses(answer: str, reference: str) -> None:
    theirs = Rouge(metrics=["rouge-l"]).get_scores(" ".join(words(answer)), " ".join(words(reference)))[0]["rouge-l"][
        "f"
    ]
    assert text_scores(answer, [reference])["rouge_l"] == pytest.approx(theirs, abs=1e-7)


@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcde"), max_size=90))
def test_the_longest_common_subsequence_is_the_tables(first: list[str], second: list[str]) -> None:
    assert common_subsequence(first, second) == plain_subsequence(first, second)
    both = len(first) + len(second)
    assert rouge_l(first, second) == (2 * plain_subsequence(first, second) / both if first and second else 0.0)


def test_words_are_jiebas_and_leave_no_cache(tmp_path: Path) -> None:
    # The examples of jieba's own README.
    assert words("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert words("他来到了网易杭研大厦, OK 3.5") == ["他", "来到", "了", "网易", "杭研", "大厦", ",", "OK", "3.5"]
    code = "from trainer.evaluate.scores.words import words; print(words('我来到北京'))"
    clean = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['我', '来到', '北京']"
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_what_has_no_words() -> None:
    assert text_scores(" \n", ["好"]) == dict.fromkeys(TEXT_METRICS, 0.0)
    with pytest.raises(ValueError, match="reference"):
        text_scores("好", ["  "])
    same = text_scores("规律作息能够改善失眠问题", ["规律作息能够改善失眠问题"])
    assert all(score == pytest.approx(1) for score in same.values())


def test_corpus_bleu_is_sacrebleus() -> None:
    answers, references = [a for a, _ in PAIRS], [[r] for _, r in PAIRS]
    theirs = sacrebleu.corpus_bleu(answers, [[r for _, r in PAIRS]], tokenize="zh")
    ours = corpus_bleu(answers, references)
    assert ours.score == pytest.approx(theirs.score / 100)
    assert "tok:zh" in ours.signature
    counts = bleu_counts(answers, references)
    assert counts.sum(axis=0)[2:].tolist() == [*theirs.counts, *theirs.totals]
    assert bleu_of_counts(counts.sum(axis=0, keepdims=True))[0] == pytest.approx(theirs.score / 100)


def test_corpus_bleu_with_more_references_for_some() -> None:
    answers = ["我很难过", "多喝水，注意休息"]
    references = [["我非常难过", "我很伤心"], ["注意休息，多喝热水"]]
    theirs = sacrebleu.corpus_bleu(answers, [["我非常难过", "注意休息，多喝热水"], ["我很伤心", None]], tokenize="zh")
    assert corpus_bleu(answers, references).score == pytest.approx(theirs.score / 100)
    counts = bleu_counts(answers, references)
    assert bleu_of_counts(counts.sum(axis=0, keepdims=True))[0] == pytest.approx(theirs.score / 100)


@pytest.mark.parametrize("answer", ["好", "完全不同", "我很", ""])
def test_corpus_bleu_at_its_edges(answer: str) -> None:
    """Too short for 4-grams, no match, empty: the counted score stays sacrebleu's."""
    theirs = sacrebleu.corpus_bleu([answer], [["我很难过，想哭"]], tokenize="zh").score / 100
    assert bleu_of_counts(bleu_counts([answer], [["我很难过，想哭"]]))[0] == pytest.approx(theirs)
    with pytest.raises(ValueError):
        corpus_bleu([answer], [[]])


def test_the_interval_of_corpus_bleu_is_close_to_sacrebleus() -> None:
    answers, references = [a for a, _ in PAIRS] * 8, [[r] for _, r in PAIRS] * 8
    ours = statistic_interval(bleu_counts(answers, references), bleu_of_counts, seed=1, num_resamples=2000)
    theirs = sacrebleu.BLEU(tokenize="zh").corpus_score(answers, [[r for [r] in references]], n_bootstrap=2000)
    assert ours.mean == pytest.approx(theirs.score / 100) and ours.low is not None and ours.high is not None
    half = (ours.high - ours.low) / 2
    assert half == pytest.approx(theirs._ci / 100, rel=0.15)


def test_paired_corpus_bleu_sees_the_better_one() -> None:
    references = [[r] for _, r in PAIRS] * 8
    worse = bleu_counts([a for a, _ in PAIRS] * 8, references)
    better = bleu_counts([r for _, r in PAIRS] * 8, references)
    found = paired_statistic_interval(worse, better, bleu_of_counts, seed=1, num_resamples=500)
    assert found.low > 0 and found.p < 0.01 and found.num_pairs == 48
    same = paired_statistic_interval(worse, worse, bleu_of_counts, seed=1, num_resamples=500)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
