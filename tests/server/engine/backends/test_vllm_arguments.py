"""Settings on their way to vLLM, without vLLM."""

import importlib.util
from pathlib import Path

import pytest

from server.engine.backends import create_backend
from server.engine.backends.vllm.options import lora_rank_for
from server.errors import ConfigError
from server.settings import Settings, load_settings

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_installs_it(model_folder: Path, tmp_path: Path) -> None:
    settings = Settings(engine="vllm", model=str(model_folder), home=tmp_path)
    with pytest.raises(ConfigError, match="make vllm"):
        create_backend(settings)


@pytest.mark.parametrize(("ranks", "expected"), [([], 16), ([4], 8), ([8, 16], 16), ([17], 32), ([300], 320)])
def test_the_largest_rank_is_rounded_up_to_one_that_vllm_has(ranks: list[int], expected: int) -> None:
    assert lora_rank_for(ranks) == expected


def test_bitsandbytes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="QLOOP_ENGINE=hf"):
        load_settings({"vllm_quantization": "bitsandbytes"})


def test_more_arguments_are_json(tmp_path: Path) -> None:
    assert load_settings({"vllm_args": '{"block_size": 32}'}).settings.vllm_args == {"block_size": 32}
    for bad in ("block_size=32", "[1]"):
        with pytest.raises(ConfigError, match="QLOOP_VLLM_ARGS"):
            load_settings({"vllm_args": bad})
