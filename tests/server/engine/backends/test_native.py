"""The compiled kernels: their numbers against float64, their independence of batch mates, and life without them."""

import logging
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.backends.hf import HfBackend, HfOptions, native
from server.engine.backends.hf.arithmetic import Heads, TorchArithmetic
from server.engine.backends.hf.batch import Batch, Part
from server.engine.backends.hf.kv_store import KvShape, KvStore
from server.engine.backends.hf.lora import LoraMatrices, TorchLora
from server.engine.backends.hf.native import Kernels, load_kernels
from server.engine.backends.hf.native_lora import NativeLora
from server.engine.backends.hf.projection import Projection
from server.engine.backends.hf.slots import BASE, SlotMap
from tests.server.engine.backends.driver import adapter_info, ask, run
from tests.server.engine.backends.folders import write_adapter, write_model

has_amx = all(torch.cpu.get_capabilities().get(name) for name in native.NEEDED)
needs_amx = pytest.mark.skipif(not has_amx, reason="this CPU has no AMX")
needs_kernels = pytest.mark.skipif(not (has_amx and shutil.which("gcc")), reason="no AMX here, or no gcc")
TOKENS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 255, 256, 257, 300)
BF16 = 2.0**-8  # half the distance between neighbours, relative


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    made = load_kernels(tmp_path_factory.mktemp("kernels"))
    assert made is not None
    return made


def assert_close(found: Tensor, exact: Tensor, relative: float = 2 * BF16, absolute: float = 1e-3) -> None:
    torch.testing.assert_close(found.double(), exact.double(), rtol=relative, atol=absolute)


def bf16(*sizes: int) -> Tensor:
    return torch.randn(*sizes).bfloat16()


# --- linear maps ---


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (96, 160), (128, 896)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_bf16(kernels: Kernels, outputs: int, inputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = bf16(outputs, inputs), torch.randn(outputs) if has_bias else None
    packed = kernels.pack(weight)
    for tokens in TOKENS:
        x = bf16(tokens, inputs)
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert_close(kernels.linear_bf16(x, packed, bias, outputs), exact, absolute=0.02)


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (96, 192), (128, 896)])
def test_linear_int8_is_exact_integer_arithmetic(kernels: Kernels, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales, bias = torch.rand(outputs) / 100, torch.randn(outputs)
    packed = kernels.pack(weight)
    for tokens in TOKENS:
        # Whole numbers times a power of two for each token: nothing is rounded on the way in.
        numbers = torch.randint(-127, 128, (tokens, inputs))
        numbers[:, 0] = 127
        steps = 2.0 ** (torch.arange(tokens) % 9 - 4)[:, None]
        exact = (numbers.double() @ weight.double().T) * steps * scales.double() + bias.double()
        found = kernels.linear_int8((numbers * steps).bfloat16(), packed, scales, bias)
        assert_close(found, exact)


@needs_kernels
def test_linear_int8_rounds_activations_to_the_nearest(kernels: Kernels) -> None:
    x = (torch.arange(64) - 20.3).bfloat16()[None]
    step = float(x.abs().max()) / 127
    identity = torch.zeros(64, 64, dtype=torch.int8).fill_diagonal_(1)
    found = kernels.linear_int8(x, kernels.pack(identity), torch.ones(64), None)
    assert ((found - x).abs() <= 0.51 * step + 2 * BF16 * x.abs()).all()


@needs_kernels
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_token_does_not_depend_on_its_batch_mates(kernels: Kernels, is_int8: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (96, 128), dtype=torch.int8) if is_int8 else bf16(96, 128)
    packed, scales = kernels.pack(weight), torch.rand(96)

    def linear(x: Tensor) -> Tensor:
        return kernels.linear_int8(x, packed, scales, None) if is_int8 else kernels.linear_bf16(x, packed, None, 96)

    x = bf16(70, 128)
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(linear(x), alone)
    x[3] = torch.nan
    x[40] = torch.inf
    found = linear(x)
    assert not found[[3, 40]].isfinite().any()
    others = [i for i in range(70) if i not in (3, 40)]
    assert torch.equal(found[others], alone[others])


@needs_kernels
def test_zeros_stay_zeros_in_int8(kernels: Kernels) -> None:
    packed = kernels.pack(torch.ones(32, 64, dtype=torch.int8))
    assert kernels.linear_int8(torch.zeros(2, 64).bfloat16(), packed, torch.ones(32), None).eq(0).all()


def test_which_weights_fit_the_tiles() -> None:
    assert Kernels.can_pack(torch.empty(64, 96, dtype=torch.bfloat16))
    assert not Kernels.can_pack(torch.empty(48, 96, dtype=torch.bfloat16))
    assert not Kernels.can_pack(torch.empty(64, 48, dtype=torch.bfloat16))
    assert not Kernels.can_pack(torch.empty(64, 96, dtype=torch.int8))


# --- between them ---


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_add_and_norm(kernels: Kernels, tokens: int) -> None:
    torch.manual_seed(0)
    hidden, delta, weight = bf16(tokens, 96), bf16(tokens, 96), bf16(96)
    added = hidden + delta
    exact = added.double() / (added.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close(kernels.add_and_norm(hidden, delta, weight, 1e-6), exact)
    assert torch.equal(hidden, added)
    assert_close(kernels.add_and_norm(hidden, None, weight, 1e-6), exact)
    assert torch.equal(hidden, added)


@needs_kernels
def test_silu_and_multiply_over_the_whole_range(kernels: Kernels) -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4080), torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, 3e-39])])
    gate = torch.cat([gate, torch.zeros(-len(gate) % 16)]).bfloat16()
    up = torch.full_like(gate, 3)
    found = kernels.silu_and_multiply(torch.cat([gate, up])[None])[0]
    x = gate.double()
    exact = torch.where(x < -1e20, 0, x * torch.sigmoid(x)) * 3
    assert_close(found, exact, absolute=1e-5)
    nan = kernels.silu_and_multiply(torch.full((1, 32), torch.nan).bfloat16())
    assert nan.isnan().all()


@needs_kernels
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 32), (3, 3, 64), (7, 1, 128)])
def test_turn_and_store(kernels: Kernels, heads: int, kv_heads: int, size: int, is_normed: bool) -> None:
    """As torch does it in float64: same queries, same cells, and no other cell touched."""
    torch.manual_seed(0)
    parts = [Part(3, 7, [0]), Part(0, 2, [0] * 9), Part(1, 0, [0] * 30)]
    norms = [bf16(size) for _ in range(2)] if is_normed else [None, None]
    split = Heads(heads, kv_heads, size, norms[0], norms[1], 1e-6)
    wide = Heads(heads, kv_heads, size, *(n if n is None else n.double() for n in norms), 1e-6)
    results = []
    for dtype, arithmetic, asked in ((torch.bfloat16, kernels, split), (torch.float64, TorchArithmetic(), wide)):
        store = KvStore(KvShape(2, kv_heads, size, dtype, torch.device("cpu")), 4, 64)
        batch = Batch(parts, store)
        torch.manual_seed(1)
        projected = bf16(len(batch.token_ids), (heads + 2 * kv_heads) * size).to(dtype)
        cos, sin = (bf16(len(projected), 1, size).to(dtype) for _ in range(2))
        queries = arithmetic.turn_and_store(projected, asked, cos, sin, 1, batch)
        results.append((queries, store.keys[1], store.values[1], store.keys[0]))
    for found, exact in zip(*results, strict=True):
        assert_close(found, exact, absolute=0.02)
    assert results[0][1].count_nonzero() <= 40 * kv_heads * size


# --- adapters ---


CPU = torch.device("cpu")
QKV, GATE_UP, OUT = {"q": 64, "k": 32, "v": 32}, {"gate": 96, "up": 96}, {"o": 1056}


def adapted(
    kernels: Kernels | None, widths: dict[str, int], base: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Projection, SlotMap]:
    """A projection of 64 inputs with modules of these widths, whose base map gives `base` for anything."""
    ends = torch.tensor([0, *widths.values()]).cumsum(0).tolist()
    parts = {name: slice(start, end) for name, start, end in zip(widths, ends[:-1], ends[1:], strict=True)}
    slots = SlotMap()
    return Projection(lambda x: base[: len(x)].clone(), parts, 64, slots, dtype, CPU, kernels), slots


def random_lora(widths: dict[str, int], rank: int) -> dict[str, LoraMatrices]:
    return {name: LoraMatrices(bf16(rank, 64), bf16(width, rank)) for name, width in widths.items()}


@needs_kernels
@pytest.mark.parametrize("widths", [QKV, GATE_UP, OUT])
@pytest.mark.parametrize("ranks", [(1,), (2, 5, 8), (40, 3, 16, 64)])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 48, 300])
def test_every_token_gets_its_own_lora(
    kernels: Kernels, widths: dict[str, int], ranks: tuple[int, ...], tokens: int
) -> None:
    """Ranks differ, some modules have no LoRA, tokens of the base stay bit for bit."""
    torch.manual_seed(0)
    base, x = bf16(tokens, sum(widths.values())), bf16(tokens, 64)
    projection, slot_map = adapted(kernels, widths, base)
    assert isinstance(projection.lora, NativeLora)
    exact, slots = base.double(), [(7 * i) % (len(ranks) + 1) - 1 for i in range(1, tokens + 1)]
    for slot, rank in enumerate(ranks):
        matrices = random_lora(dict(list(widths.items())[: slot + 1]), rank)
        projection.attach_lora(slot, matrices)
        own = torch.tensor([other == slot for other in slots])
        for name, matrix in matrices.items():
            exact[own, projection.parts[name]] += x[own].double() @ matrix.a.double().T @ matrix.b.double().T
    slot_map.set(slots, CPU)
    found = projection(x)
    assert float((found.double() - exact).norm() / exact.norm()) < BF16
    assert_close(found, exact, relative=0.03, absolute=0.05 * float(exact.std()))
    is_base = torch.tensor([slot == BASE for slot in slots])
    assert torch.equal(found[is_base], base[is_base])


@needs_kernels
@pytest.mark.parametrize("widths", [QKV, GATE_UP, OUT])
def test_a_lora_does_not_depend_on_batch_mates_or_on_who_is_loaded(kernels: Kernels, widths: dict[str, int]) -> None:
    """Bit for bit: alone in the batch, among others, and after others have come and gone."""
    torch.manual_seed(0)
    x, base = bf16(1, 64).expand(40, -1), bf16(1, sum(widths.values())).expand(40, -1)
    projection, slot_map = adapted(kernels, widths, base)
    loras = [random_lora(widths, rank) for rank in (5, 30, 9, 70)]
    alone = []
    for slot, lora in enumerate(loras):
        projection.attach_lora(slot, lora)
        slot_map.set([slot], CPU)
        alone.append(projection(x[:1])[0])
        if slot == 1:
            projection.detach(slot)
    projection.attach_lora(1, loras[1])
    loaded = [BASE, 0, 1, 2, 3]
    for removed in (None, 0, 3):
        if removed is not None:
            projection.detach(removed)
            loaded.remove(removed)
        slots = [loaded[i % len(loaded)] for i in range(40)]
        slot_map.set(slots, CPU)
        for slot, found in zip(slots, projection(x), strict=True):
            assert torch.equal(found, base[0] if slot == BASE else alone[slot])
    projection.detach(1)
    projection.detach(2)
    assert projection.lora.a.numel() == projection.lora.b.numel() == 0


@needs_kernels
def test_a_lora_that_overflows_spoils_only_its_own_tokens(kernels: Kernels) -> None:
    projection, slot_map = adapted(kernels, {"o": 32}, torch.zeros(3, 32).bfloat16())
    for slot, value in enumerate((torch.inf, 1.0)):
        a, b = torch.full((4, 64), value).bfloat16(), torch.ones(32, 4).bfloat16()
        projection.attach_lora(slot, {"o": LoraMatrices(a, b)})
    slot_map.set([0, 1, BASE], CPU)
    found = projection(torch.ones(3, 64).bfloat16())
    assert not found[0].isfinite().any()
    assert found[1].eq(256).all() and found[2].eq(0).all()


@needs_kernels
def test_loras_that_no_token_uses_are_not_read(kernels: Kernels) -> None:
    base = torch.zeros(3, 32).bfloat16()
    projection, slot_map = adapted(kernels, {"o": 32}, base)
    for slot, value in enumerate((torch.nan, 1.0, torch.nan)):  # of 32 columns each: blocks of their own
        a, b = torch.full((32, 64), value).bfloat16(), torch.full((32, 32), value).bfloat16()
        projection.attach_lora(slot, {"o": LoraMatrices(a, b)})
    x = torch.ones(3, 64).bfloat16()
    slot_map.set([1, BASE, 1], CPU)
    assert projection(x).tolist() == [[2048.0] * 32, [0.0] * 32, [2048.0] * 32]
    slot_map.set([BASE, 3, BASE], CPU)  # an adapter that does not act here
    assert torch.equal(projection(x), base)


@needs_kernels
def test_which_projections_take_the_kernel(kernels: Kernels) -> None:
    for widths, dtype, chosen, expected in (
        (QKV, torch.bfloat16, kernels, NativeLora),
        (QKV, torch.bfloat16, None, TorchLora),
        (QKV, torch.float32, kernels, TorchLora),
        ({"q": 80, "k": 16}, torch.bfloat16, kernels, TorchLora),
    ):
        projection, _ = adapted(chosen, widths, torch.zeros(1, 128), dtype)
        assert type(projection.lora) is expected


# --- the whole backend ---


def logprobs(backend: HfBackend, **options: Any) -> Tensor:
    text = run(backend, ask([(11 * i) % 251 for i in range(60)], max_tokens=1, prompt_logprobs=0, **options))["a", 0]
    assert text.prompt_logprobs is not None
    return torch.tensor([entry.logprob for entry in text.prompt_logprobs if entry is not None])


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_backend_with_kernels_is_as_exact_as_one_without(tmp_path: Path, dtype: Any) -> None:
    """Sizes that all kernels take: one that is wrong anywhere shows in every logprob."""
    sizes = {"vocab_size": 288, "hidden_size": 128, "intermediate_size": 256}
    folder = write_model(tmp_path / "model", **sizes)
    adapter = write_adapter(tmp_path / "adapter", folder)
    exact: list[Tensor] = []
    errors: dict[bool, list[float]] = {False: [], True: []}
    for chosen, cache in (("fp32", None), (dtype, None), (dtype, tmp_path / "cache")):
        backend = HfBackend(HfOptions(folder, "tiny", dtype=chosen, kv_cache_gib=0.05, kernel_cache=cache))
        backend.load()
        backend.load_adapter(adapter_info("x"), adapter)
        found = [logprobs(backend), logprobs(backend, adapter=adapter_info("x").id)]
        if chosen == "fp32":
            exact = found
        else:
            errors[cache is not None] = [float((a - b).abs().mean()) for a, b in zip(found, exact, strict=True)]
        backend.close()
    assert list((tmp_path / "cache").glob("kernels-*.so"))
    for without, with_kernels in zip(errors[False], errors[True], strict=True):
        assert 0 < with_kernels < 1.5 * without + 0.02


@needs_kernels
def test_a_greedy_text_is_the_same_alone_and_in_any_batch(tmp_path: Path) -> None:
    """Stronger than what bf16 promises elsewhere: no kernel mixes tokens, so batch mates change no rounding."""
    folder = write_model(tmp_path / "model", vocab_size=288, hidden_size=128, intermediate_size=256)
    options = {"dtype": "bf16", "kv_cache_gib": 0.05, "prefix_cache": False, "kernel_cache": tmp_path / "cache"}
    backend = HfBackend(HfOptions(folder, "tiny", **options))  # type: ignore[arg-type]
    backend.load()
    prompts = [[(7 * i + 13 * k) % 251 for i in range(5 + 6 * k)] for k in range(6)]
    wishes = {"max_tokens": 40, "ignore_eos": True}
    alone = [run(backend, ask(prompt, str(k), **wishes))[str(k), 0].token_ids for k, prompt in enumerate(prompts)]
    together = run(backend, *(ask(prompt, str(k), **wishes) for k, prompt in enumerate(prompts)))
    assert [together[str(k), 0].token_ids for k in range(6)] == alone
    backend.close()


# --- getting them ---


@needs_kernels
def test_they_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_kernels(tmp_path / "cache") is not None
    (made,) = (tmp_path / "cache").iterdir()
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler any more
    assert load_kernels(tmp_path / "cache") is not None
    assert list((tmp_path / "cache").iterdir()) == [made]


@needs_amx
def test_without_a_compiler_the_log_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "cache") is None
    assert "apt-get install gcc" in caplog.text


@needs_amx
def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = tmp_path / "gcc"
    fake.write_text("#!/bin/sh\necho 'kernels.c:1: error: unknown target' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "cache") is None
    assert "kernels.c:1: error: unknown target" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_cpus_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert load_kernels(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
