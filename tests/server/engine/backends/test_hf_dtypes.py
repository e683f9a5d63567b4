"""QLOOP_HF_DTYPE: each value loads, computes nearly what float32 computes, and serves adapters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.backends.hf.weights import pack
from server.errors import ConfigError
from tests.server.engine.backends.driver import adapter_info, ask, run

PROMPT = [(11 * i) % 251 for i in range(60)]
# How far logprobs may be off on average, in nat. The model is random: nothing in it is robust to rounding.
TOLERANCE = {"bf16": 0.15, "fp16": 0.05, "int8": 0.6, "nf4": 4.0, "bnb-int8": 0.8}


def start(model_folder: Path, dtype: Any, **options: Any) -> HfBackend:
    made = HfBackend(HfOptions(model_folder, "tiny", dtype=dtype, kv_cache_gib=0.05, **options))
    assert made.load().dtype == dtype
    return made


def prompt_logprobs(backend: HfBackend, **options: Any) -> torch.Tensor:
    text = run(backend, ask(PROMPT, max_tokens=1, prompt_logprobs=0, **options))["a", 0]
    assert text.prompt_logprobs is not None
    return torch.tensor([entry.logprob for entry in text.prompt_logprobs if entry is not None])


@pytest.fixture(scope="module")
def exact(model_folder: Path, adapter_folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    backend = start(model_folder, "fp32")
    backend.load_adapter(adapter_info("x"), adapter_folder)
    return prompt_logprobs(backend), prompt_logprobs(backend, adapter=adapter_info("x").id)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nearly_what_float32_computes(
    model_folder: Path, adapter_folder: Path, exact: tuple[torch.Tensor, torch.Tensor], dtype: str
) -> None:
    backend = start(model_folder, dtype)
    backend.load_adapter(adapter_info("x"), adapter_folder)
    base, adapted = prompt_logprobs(backend), prompt_logprobs(backend, adapter=adapter_info("x").id)
    assert (base - exact[0]).abs().mean() < TOLERANCE[dtype]
    # The adapter moves the model to where it moves the exact one, not to somewhere else.
    assert (adapted - exact[1]).abs().mean() < 0.7 * (base - exact[1]).abs().mean()
    text = run(backend, ask(PROMPT, "b", max_tokens=20, ignore_eos=True))["b", 0]
    assert len(text.token_ids) == 20
    backend.close()


def test_int8_numbers_of_a_token_do_not_depend_on_its_batch_mates() -> None:
    torch.manual_seed(0)
    linear = pack(torch.randn(48, 64), torch.randn(48), "int8", None)
    x = torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    together = linear(x)
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(together, alone)
    assert math.isfinite(float(linear(torch.zeros(1, 64)).abs().max()))


def test_int8_is_refused_where_only_the_models_own_code_runs(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="bnb-int8 or nf4"):
        HfBackend(HfOptions(model_folder, "tiny", dtype="int8", forward="generic")).load()


def test_int8_is_refused_on_a_cpu_without_the_instructions(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(ConfigError, match="8-bit matrix instructions"):
        HfBackend(HfOptions(model_folder, "tiny", dtype="int8")).load()
