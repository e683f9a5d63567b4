"""Adapters on linear maps: every token of a mixed batch gets exactly what PEFT computes for its adapter alone."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_files import AdapterWeights, ModelShape, model_shape, read_adapter
from server.engine.backends.hf.adapters import LoadedAdapters
from server.engine.backends.hf.lora import LoraMatrices
from server.engine.backends.hf.projection import Ia3Vector, Projection
from server.engine.backends.hf.slots import SlotMap
from tests.server.engine.backends.families import FAMILIES, load
from tests.server.engine.backends.folders import load_reference
from tests.server.engine.backends.folders import write_adapter as write_lora
from tests.server.engine.backends.peft_adapters import load_adapted, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # peft corrects itself for GPT-2
CPU = torch.device("cpu")
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 6}, "alpha_pattern": {"down_proj": 1}}
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass
class Wrapped:
    """A transformers model with a projection in place of every linear map."""

    model: Any
    shape: ModelShape
    slot_map: SlotMap
    adapters: LoadedAdapters

    def logits(self, slots: list[int]) -> Tensor:
        self.slot_map.set(slots, CPU)
        logits: Tensor = self.model(input_ids=TOKENS[:, : len(slots)], use_cache=False).logits[0]
        return logits


def wrap(model: Any) -> Wrapped:
    shape, slot_map = model_shape(model, 512), SlotMap()
    projections = {}
    for name, (num_inputs, num_outputs) in shape.modules.items():
        base = model.get_submodule(name)
        projections[name] = Projection(base, {name: slice(0, num_outputs)}, num_inputs, slot_map, shape.dtype, CPU)
        model.set_submodule(name, projections[name])
    return Wrapped(model, shape, slot_map, LoadedAdapters(projections))


@pytest.fixture
def wrapped(model_folder: Path) -> Wrapped:
    return wrap(load_reference(model_folder))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, PATTERNS, {"target_modules": ["lm_head", "q_proj"]}, {"r": 1, "lora_alpha": 3}],
    ids=["plain", "rslora", "patterns", "lm_head", "rank 1"],
)
def test_lora_logits_equal_peft(model_folder: Path, tmp_path: Path, wrapped: Wrapped, options: dict[str, Any]) -> None:
    folder = write_lora(tmp_path, model_folder, **options)
    wrapped.adapters.attach("x", read_adapter(folder, wrapped.shape))
    expected = PeftModel.from_pretrained(load_reference(model_folder), str(folder)).eval()(input_ids=TOKENS).logits[0]
    torch.testing.assert_close(wrapped.logits([0] * 5), expected, atol=2e-3, rtol=1e-4)
    assert (expected - wrapped.logits([-1] * 5)).abs().max() > 0.1


@pytest.mark.parametrize("method", ["LoRA", "rsLoRA", "IA3"])
@pytest.mark.parametrize("family", ["Qwen3", "GPT-2", "Bloom"])
def test_logits_of_a_family_equal_peft(tmp_path: Path, family: str, method: str) -> None:
    model_folder = FAMILIES[family].write(tmp_path / "model")
    folder = write_adapter(tmp_path / "adapter", FAMILIES[family], model_folder, method)
    wrapped = wrap(load(model_folder))
    wrapped.adapters.attach("x", read_adapter(folder, wrapped.shape))
    expected = load_adapted(model_folder, folder)(input_ids=TOKENS, use_cache=False).logits[0]
    plain = wrapped.logits([-1] * 5)
    torch.testing.assert_close(wrapped.logits([0] * 5), expected, atol=2e-3, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("Qwen3", "model.layers.0.self_attn.k_proj"),
        ("Qwen3", "model.layers.1.mlp.down_proj"),
        ("GPT-2", "transformer.h.1.attn.c_attn"),
        ("GPT-2", "transformer.h.0.mlp.c_proj"),
    ],
)
def test_each_token_of_a_mix_equals_its_own_peft_module(tmp_path: Path, family: str, module: str) -> None:
    model_folder = FAMILIES[family].write(tmp_path / "model")
    wrapped = wrap(load(model_folder))
    x = torch.randn(9, wrapped.shape.modules[module][0])
    modules = [load(model_folder).get_submodule(module)]
    for method in ("LoRA", "rsLoRA", "IA3"):
        folder = write_adapter(tmp_path / method, FAMILIES[family], model_folder, method)
        wrapped.adapters.attach(method, read_adapter(folder, wrapped.shape))
        modules.append(load_adapted(model_folder, folder).base_model.model.get_submodule(module))
    slots = [0, -1, 2, 1, 1, 0, -1, 2, 0]
    wrapped.slot_map.set(slots, CPU)
    mixed = wrapped.model.get_submodule(module)(x)
    for token, slot in enumerate(slots):
        torch.testing.assert_close(mixed[token], modules[slot + 1](x[token]), atol=1e-4, rtol=1e-4)


def random_lora(parts: dict[str, slice], num_inputs: int, rank: int) -> dict[str, LoraMatrices]:
    return {
        name: LoraMatrices(torch.randn(rank, num_inputs), torch.randn(part.stop - part.start, rank))
        for name, part in parts.items()
    }


def linear(num_inputs: int, num_outputs: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(num_outputs, num_inputs)
    return lambda x: torch.nn.functional.linear(x, weight)


@pytest.mark.parametrize("ends", [(16, 24, 32), (8, 16, 24)], ids=["grouped queries", "equal widths"])
def test_fused_parts_equal_separate_ones(ends: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    parts = {"q": slice(0, ends[0]), "k": slice(ends[0], ends[1]), "v": slice(ends[1], ends[2])}
    weight, slot_map = torch.randn(ends[2], 12), SlotMap()
    fused = Projection(lambda x: x @ weight.T, parts, 12, slot_map, torch.float32, CPU)
    separate = {
        name: Projection(
            lambda x, rows=weight[part]: x @ rows.T,
            {name: slice(0, part.stop - part.start)},
            12,
            slot_map,
            torch.float32,
            CPU,
        )
        for name, part in parts.items()
    }
    loras = {0: random_lora(parts, 12, 3), 2: {"v": LoraMatrices(torch.randn(5, 12), torch.randn(8, 5))}}
    vectors = {"k": Ia3Vector(False, torch.randn(8)), "v": Ia3Vector(False, torch.randn(8))}
    for slot, matrices in loras.items():
        fused.attach_lora(slot, matrices)
        for name, matrix in matrices.items():
            separate[name].attach_lora(slot, {name: matrix})
    fused.attach_ia3(1, vectors)
    for name, vector in vectors.items():
        separate[name].attach_ia3(1, {name: vector})
    x = torch.randn(2, 6, 12)  # leading dimensions share the slots
    slot_map.set([1, 0, 2, -1, 2, 1], CPU)
    expected = torch.cat([projection(x) for projection in separate.values()], dim=-1)
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)
    assert (fused(x) - x @ weight.T).abs().amax(-1)[0].gt(0.1).tolist() == [True, True, True, False, True, True]


def test_base_tokens_are_untouched_to_the_bit(model_folder: Path, wrapped: Wrapped, tmp_path: Path) -> None:
    plain = wrapped.logits([-1] * 5)
    wrapped.adapters.attach("x", read_adapter(write_lora(tmp_path, model_folder), wrapped.shape))
    mixed = wrapped.logits([-1, -1, 0, 0, -1])  # attention lets later tokens see adapted ones, earlier ones not
    assert torch.equal(mixed[:2], plain[:2]) and not torch.equal(mixed[2], plain[2])
    assert torch.equal(wrapped.logits([-1] * 5), plain)


def test_adapter_that_overflows_does_not_spoil_other_tokens() -> None:
    slot_map = SlotMap()
    projection = Projection(linear(8, 8), {"p": slice(0, 8)}, 8, slot_map, torch.float32, CPU)
    x = torch.randn(5, 8)
    plain = projection(x)
    wild = LoraMatrices(torch.full((2, 8), 3e38) * x[1].sign(), torch.randn(8, 2))
    projection.attach_lora(0, {"p": wild})
    projection.attach_ia3(1, {"p": Ia3Vector(True, torch.full((8,), 3e38))})
    projection.attach_ia3(2, {"p": Ia3Vector(False, torch.full((8,), 2.0))})
    slot_map.set([-1, 0, 1, 2, -1], CPU)
    mixed = projection(x)
    assert torch.equal(mixed[[0, 4]], plain[[0, 4]]) and torch.equal(mixed[3], plain[3] * 2)
    assert not mixed[1].isfinite().all() and not mixed[2].isfinite().all()


def test_only_the_columns_of_present_adapters_are_computed_and_right() -> None:
    """Sixty adapters of different ranks; a batch with two that lie far apart, then one, then all."""
    torch.manual_seed(0)
    slot_map = SlotMap()
    projection = Projection(linear(8, 6), {"p": slice(0, 6)}, 8, slot_map, torch.float32, CPU)
    loras = [random_lora(projection.parts, 8, 1 + slot % 7)["p"] for slot in range(60)]
    for slot, matrix in enumerate(loras):
        projection.attach_lora(slot, {"p": matrix})
    x = torch.randn(60, 8)
    plain = projection(x)
    for slots in ([59, -1, 0] * 20, [7] * 60, [7, 8, 9, 12] * 15, list(range(60))):
        slot_map.set(slots, CPU)
        added = [x[t] @ loras[s].a.T @ loras[s].b.T if s >= 0 else torch.zeros(6) for t, s in enumerate(slots)]
        torch.testing.assert_close(projection(x), plain + torch.stack(added), atol=1e-4, rtol=1e-4)
    slot_map.set([59, 0], CPU)
    spans = slot_map.spans(tuple((slot, 1 + slot % 7) for slot in range(60)))
    assert (
        len(spans) == 2 and sum(span.end - span.start for span in spans) == loras[0].a.shape[0] + loras[59].a.shape[0]
    )


def test_slots_are_reused_and_the_rest_stays(model_folder: Path, tmp_path: Path, wrapped: Wrapped) -> None:
    folders = [write_lora(tmp_path / str(i), model_folder, seed=i, r=2 + i) for i in range(3)]
    folders[1] = write_adapter(tmp_path / "ia3", FAMILIES["Qwen3"], model_folder, "IA3")
    for i, folder in enumerate(folders):
        wrapped.adapters.attach(str(i), read_adapter(folder, wrapped.shape))
    before = wrapped.logits([2] * 5)
    wrapped.adapters.attach("2", read_adapter(folders[0], wrapped.shape))  # already there: stays as it is
    wrapped.adapters.detach("1")
    wrapped.adapters.detach("unknown")
    wrapped.adapters.attach("again", read_adapter(folders[0], wrapped.shape))
    assert wrapped.adapters.slots == {"0": 0, "2": 2, "again": 1}
    torch.testing.assert_close(wrapped.logits([2] * 5), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wrapped.logits([1] * 5), wrapped.logits([0] * 5), atol=1e-4, rtol=1e-4)


def tensor_bytes() -> int:
    """Memory of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(storages.values())


@pytest.mark.parametrize("method", ["LoRA", "IA3", "prefix tuning"])
def test_detach_returns_all_memory(tmp_path: Path, method: str) -> None:
    family = FAMILIES["Qwen3"]
    model_folder = family.write(tmp_path / "model")
    folder = write_adapter(tmp_path / "adapter", family, model_folder, method)
    wrapped = wrap(load(model_folder))
    wrapped.logits([-1] * 5)
    before = tensor_bytes()
    wrapped.adapters.attach("x", read_adapter(folder, wrapped.shape))
    wrapped.logits([-1, 0, 0, -1, 0])
    assert tensor_bytes() > before
    wrapped.adapters.detach("x")
    assert tensor_bytes() == before


def test_failed_attach_leaves_everything_as_it_was() -> None:
    slot_map, parts = SlotMap(), {"gate": slice(0, 4), "up": slice(4, 8)}
    fused = Projection(linear(6, 8), parts, 6, slot_map, torch.float32, CPU)
    single = Projection(linear(6, 4), {"down": slice(0, 4)}, 6, slot_map, torch.float32, CPU)
    adapters = LoadedAdapters({"gate": fused, "up": fused, "down": single})
    scale, x = torch.full((6,), 2.0), torch.randn(3, 6)
    good = AdapterWeights(ia3={"down": Ia3Vector(True, scale), "up": Ia3Vector(False, torch.full((4,), 3.0))})
    adapters.attach("good", good)
    slot_map.set([0, 1, -1], CPU)
    before = [fused(x), single(x)]
    with pytest.raises(AdapterError, match="QLOOP_HF_FORWARD=generic"):
        adapters.attach("input of a fused part", AdapterWeights(ia3={**good.ia3, "gate": Ia3Vector(True, scale)}))
    with pytest.raises(AdapterError, match="lm_head"):
        adapters.attach(
            "unknown part", AdapterWeights(lora=random_lora({"down": slice(0, 4), "lm_head": slice(0, 9)}, 6, 2))
        )
    assert adapters.slots == {"good": 0}
    slot_map.set([0, 1, -1], CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, [fused(x), single(x)], strict=True))


def test_cells_belong_to_their_slot() -> None:
    adapters, cells = LoadedAdapters({}), torch.randn(2, 2, 5, 1, 4)
    adapters.attach("plain", AdapterWeights())
    adapters.attach("prefix", AdapterWeights(cells=cells))
    assert [adapters.num_virtual(slot) for slot in (-1, 0, 1)] == [0, 0, 5]
    assert adapters.cells(1) is cells and adapters.cells(0) is None and adapters.cells(-1) is None
    adapters.detach("prefix")
    adapters.attach("other", AdapterWeights())
    assert adapters.slots["other"] == 1 and adapters.cells(1) is None


def test_bf16_stays_near_float32() -> None:
    torch.manual_seed(0)
    slot_map, weight = SlotMap(), torch.randn(48, 32) / 6
    matrices = LoraMatrices(torch.randn(4, 32) / 6, torch.randn(48, 4) / 2)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = weight.to(dtype)
        projection = Projection(lambda x, rows=rows: x @ rows.T, {"p": slice(0, 48)}, 32, slot_map, dtype, CPU)
        projection.attach_lora(0, {"p": LoraMatrices(matrices.a.to(dtype), matrices.b.to(dtype))})
        slot_map.set([0, -1, 0], CPU)
        outputs[dtype] = projection(torch.linspace(-1, 1, 96).view(3, 32).to(dtype)).float()
    torch.testing.assert_close(outputs[torch.bfloat16], outputs[torch.float32], atol=0.05, rtol=0.02)
