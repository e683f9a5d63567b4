"""The families of models that are trained: the serving side's tiny ones, and one whose code lies in its folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tests.models import make_tokenizer
from tests.server.engine.backends import families as serving
from tests.trainer.remote_model.modeling_tiny import TinyConfig, TinyForCausalLM

CODE = Path(__file__).parent / "remote_model" / "modeling_tiny.py"
EOS = serving.EOS


@dataclass(frozen=True)
class Family:
    """`write(folder)` makes the model folder, the same weights each time."""

    name: str
    write: Callable[[Path], Path]
    is_remote: bool = False


def write_remote_code(folder: Path) -> Path:
    """As a hub model with its own code looks: `auto_map` in config.json, the module beside it."""
    torch.manual_seed(2)
    model = TinyForCausalLM(TinyConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=False))
    serving.make_chaotic(model)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=0)
    model.save_pretrained(folder)
    shutil.copyfile(CODE, folder / CODE.name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


_SERVED = {
    "Qwen2": "Qwen2 (tied head)",
    "Qwen2.5": "Qwen2.5, YaRN",
    "Qwen3": "Qwen3",
    "Llama": "Llama, no GQA",
    "Mistral": "Mistral, with a window",
    "GLM": "GLM",
    "GPT-2": "GPT-2",
    "Bloom": "Bloom",
    "OPT": "OPT",
    "GPT-NeoX": "GPT-NeoX",
}
FAMILIES: dict[str, Family] = {
    **{name: Family(name, serving.FAMILIES[served].write) for name, served in _SERVED.items()},
    "remote code": Family("remote code", write_remote_code, is_remote=True),
}
