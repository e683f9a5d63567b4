from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.backends.hf import HfBackend, HfOptions
from server.errors import ConfigError
from server.store.hashes import weights_hash
from tests.server.engine.backends.driver import adapter_info, ask, run
from tests.server.engine.backends.folders import write_adapter, write_model
from tests.trainer.method_matrix import config_of, loss_of, train_steps
from trainer.methods.apply import apply_method
from trainer.methods.base_model import load_base
from trainer.results.quantize import quantize

PROMPT = [(11 * i) % 251 for i in range(30)]
DTYPES = {4: "nf4", 8: "bnb-int8"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", torch.bfloat16)


@pytest.fixture(scope="module", params=[4, 8], ids=["nf4", "int8"])
def bits(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(base: Path, bits: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(base, tmp_path_factory.mktemp("quantized") / "q", bits).output


@dataclass(frozen=True)
class Served:
    """Log-probabilities of PROMPT, and of PROMPT with the adapter."""

    dtype: str
    token_ids: list[int]
    plain: torch.Tensor
    adapted: torch.Tensor


def serve(folder: Path, adapter: Path, **options: Any) -> Served:
    backend = HfBackend(HfOptions(folder, "tiny", kv_cache_gib=0.05, prefill_chunk=32, **options))
    info = backend.load()
    backend.load_adapter(adapter_info("x"), adapter)

    def text(**more: Any) -> tuple[list[int], torch.Tensor]:
        told = run(backend, ask(PROMPT, max_tokens=8, ignore_eos=True, prompt_logprobs=0, **more))["a", 0]
        assert told.prompt_logprobs is not None
        return told.token_ids, torch.tensor([entry.logprob for entry in told.prompt_logprobs if entry])

    (token_ids, plain), (_, adapted) = text(), text(adapter=adapter_info("x").id)
    backend.close()
    return Served(info.dtype, token_ids, plain, adapted)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def exact(base: Path, adapter: Path) -> Served:
    return serve(base, adapter, dtype="fp32")


def test_the_folder_is_whole_and_smaller(base: Path, bits: int, tmp_path: Path) -> None:
    report = quantize(base, tmp_path / "q", bits)
    assert report.num_bytes < 0.75 * report.base_bytes
    assert report.same_tokens > (0.4 if bits == 4 else 0.8)
    assert report.kind in str(report) and "QLOOP_ENGINE=hf" in str(report)
    assert (report.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert weights_hash(report.output) != weights_hash(base)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_hf_engine_serves_it_by_itself(base: Path, folder: Path, adapter: Path, exact: Served, bits: int) -> None:
    """The numbers of an engine that quantizes the 16-bit folder while loading it, adapters included."""
    served, direct = serve(folder, adapter), serve(base, adapter, dtype=DTYPES[bits])
    assert (served.dtype, len(served.token_ids)) == (DTYPES[bits], 8)
    # nf4: the saved folder also rounds its scales.
    assert (served.plain - direct.plain).abs().mean() < (0.5 if bits == 4 else 1e-3)
    assert (served.adapted - exact.adapted).abs().mean() < 0.7 * (served.plain - exact.adapted).abs().mean()


def test_another_dtype_than_the_saved_one_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be fp32\. Set QLOOP_HF_DTYPE=auto"):
        HfBackend(HfOptions(folder, "tiny", dtype="fp32")).load()


def test_an_adapter_can_be_trained_on_it(folder: Path) -> None:
    model = apply_method(load_base(folder, dtype=torch.float32), config_of(folder, {}))
    before = loss_of(model)
    train_steps(model, 0.01)
    assert loss_of(model) < before - 0.1


def test_odd_sizes_are_served(tmp_path: Path) -> None:
    """bitsandbytes' packing for AVX512-BF16 wants multiples of 64."""
    odd = write_model(tmp_path / "odd", intermediate_size=96)
    served = serve(quantize(odd, tmp_path / "q", 4).output, write_adapter(tmp_path / "adapter", odd))
    assert (served.dtype, len(served.token_ids)) == ("nf4", 8)


def test_what_cannot_be_quantized_is_refused(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accepted are 4, 8"):
        quantize(base, tmp_path / "x", 3)
    with pytest.raises(ConfigError, match="is quantized already"):
        quantize(folder, tmp_path / "x", 4)
    with pytest.raises(ConfigError, match="exists already"):
        quantize(base, tmp_path, 4)
    with pytest.raises(ConfigError, match=r"no config\.json|no such folder"):
        quantize(tmp_path / "nowhere", tmp_path / "x", 4)
    assert list(tmp_path.iterdir()) == []
