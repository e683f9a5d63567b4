import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trainer.examples.sequences import IGNORED, Example, ExampleSet
from trainer.steps.batches import BatchPlan, Layout
from trainer.steps.packing import balance, balance_under, fill, pack, pad
from trainer.steps.probe import can_pack

LENGTHS = [3, 17, 9, 40, 5, 28, 2, 11]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(shape).float().eval()


def examples(lengths: list[int] = LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for line, length in enumerate(lengths, 1):
        token_ids = torch.randint(1, 200, (length,), generator=generator).tolist()
        labels = [IGNORED] * (length // 2) + token_ids[length // 2 :]
        made.append(Example(token_ids, labels, "x.jsonl", line))
    return made


def places(batch: dict[str, torch.Tensor]) -> dict[tuple[int, ...], tuple[int, slice]]:
    """Where each example lies in a packed batch."""
    found = {}
    for row, positions in enumerate(batch["position_ids"]):
        starts = [int(start) for start in (positions == 0).nonzero()]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            if batch["sample_lengths"][row, start] > 0:
                found[tuple(batch["input_ids"][row, start:end].tolist())] = (row, slice(start, end))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pack_length", [48, 512])
def test_packing_changes_nothing_but_speed(model: Any, attention: str, pack_length: int) -> None:
    model.set_attn_implementation(attention)
    batch = pack(examples(), 0, pack_length)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for example in examples():
            row, span = places(batch)[tuple(example.token_ids)]
            alone = model(input_ids=torch.tensor([example.token_ids])).logits[0]
            assert torch.allclose(packed[row, span], alone, atol=1e-5, rtol=0)


def test_no_example_attends_to_another(model: Any) -> None:
    """Changing one example changes no bit of the others' logits."""
    model.set_attn_implementation("sdpa")
    batch = pack(examples(), 0)
    assert len(batch["input_ids"]) == 1
    with torch.no_grad():
        before = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for example in examples():
            _, span = places(batch)[tuple(example.token_ids)]
            changed = batch["input_ids"].clone()
            changed[0, span] = (changed[0, span] + 1) % 200
            after = model(input_ids=changed, position_ids=batch["position_ids"], use_cache=False).logits[0]
            same = (after == before).all(dim=1)
            assert not same[span].any()
            same[span] = True
            assert same.all()


def test_every_token_and_label_is_there_once() -> None:
    batch = pack(examples(), 0, 48)
    assert set(places(batch)) == {tuple(example.token_ids) for example in examples()}
    assert int((batch["sample_lengths"] > 0).sum()) == sum(LENGTHS)
    for example in examples():
        row, span = places(batch)[tuple(example.token_ids)]
        assert batch["labels"][row, span].tolist() == [IGNORED, *example.labels[1:]]
    assert int((batch["labels"] != IGNORED).sum()) == ExampleSet(examples()).num_trained_tokens(range(8))


def test_padding_has_no_labels_and_is_not_attended_to() -> None:
    batch = pad([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8] * 32, [8] * 32)], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [9] * 29, [8] * 32]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7] + [IGNORED] * 29, [IGNORED] + [8] * 31]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 29, [1] * 32]
    assert pad([Example([5] * 33, [5] * 33)], 9)["input_ids"].shape == (1, 64)


def test_a_model_that_mixes_packed_examples_is_found(model: Any, tiny_model: Path) -> None:
    model.set_attn_implementation("sdpa")
    assert can_pack(model)
    assert can_pack(AutoModelForCausalLM.from_pretrained(tiny_model))
    leaky = copy.deepcopy(model)
    forward = leaky.forward
    leaky.forward = lambda **inputs: forward(
        **inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    )  # an all-ones mask turns the isolation off
    assert not can_pack(leaky)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 7))
def test_balance_deals_out_every_index_once(lengths: list[int], num_groups: int) -> None:
    groups = balance(lengths, num_groups)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in group) for group in groups]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_balance_under_and_fill_keep_the_bound(lengths: list[int], most: int) -> None:
    for groups in (balance_under(lengths, most), fill(lengths, max(50, most))):
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in group) <= max(50, most) for group in groups)


def test_fill_takes_the_fullest_bin_that_has_room() -> None:
    assert fill([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


@given(
    num=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 3),
    packs=st.booleans(),
)
def test_a_step_holds_the_same_examples_whatever_the_layout(
    num: int, batch_size: int, accumulation: int, ranks: int, packs: bool
) -> None:
    lengths = [1 + (7 * n) % 23 for n in range(num)]
    most = batch_size * 23 if packs else None
    plans = [BatchPlan(lengths, Layout(batch_size, accumulation, ranks, r, most)) for r in range(ranks)]
    window = batch_size * accumulation * ranks
    single = BatchPlan(lengths, Layout(window))
    for epoch in range(2):
        for plan in (*plans, single):
            plan.set_epoch(epoch)
        passes = [list(plan) for plan in plans]
        assert {len(mine) for mine in passes} == {len(plans[0])}
        assert len(single) == single.steps_per_epoch == plans[0].steps_per_epoch
        for step, wanted in enumerate(single.windows(epoch)):
            first = step * plans[0].accumulation
            mine = [p for rank in passes for p in rank[first : first + plans[0].accumulation]]
            assert sorted(i for part in mine for i in part) == sorted(wanted)
            if not packs:
                assert all(len(part) <= batch_size for part in mine)
    assert sorted(i for rank in passes for part in rank for i in part) == list(range(num))


def test_packing_needs_fewer_passes_for_short_rows() -> None:
    lengths = [20] * 64
    plan = BatchPlan(lengths, Layout(1, 16, max_tokens=160))
    assert plan.accumulation == 2 and len(plan) == 8
    assert BatchPlan(lengths, Layout(1, 16, max_tokens=20)).accumulation == 16


def test_similar_lengths_share_a_pass_of_a_step() -> None:
    lengths = [(37 * n) % 100 + 1 for n in range(400)]
    spans = [max(lengths[i] for i in p) - min(lengths[i] for i in p) for p in BatchPlan(lengths, Layout(8, 50))]
    assert len(spans) == 50 and max(spans) <= 2
