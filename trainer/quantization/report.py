"""One model in fp32, bf16, int8 and nf4: size, perplexity, agreement with fp32, speed; and its outlier layers.

By bitsandbytes, on whatever device this process has. One kind is in memory at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.errors import ConfigError
from server.store.model_folder import check_model_folder, read_model_config
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Row
from trainer.errors import DataError
from trainer.methods.base_model import load_base, saved_dtype
from trainer.quantization.outliers import Layer, find_outliers

KINDS: dict[str, int] = {"fp32": 0, "bf16": 0, "int8": 8, "nf4": 4}
MAX_SEQUENCES, MAX_TOKENS = 64, 512
SPEED_TOKENS = 64
TEXTS = Path(__file__).parent.parent / "demo" / "corpus" / "text.jsonl"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`same_tokens`: share of places where the likeliest token is fp32's. `gap`: mean difference of a log-probability
    of the text's own tokens from fp32, in nat."""

    kind: str
    num_bytes: int
    perplexity: float
    same_tokens: float
    gap: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    model: str
    kinds: tuple[Kind, ...]
    layers: tuple[Layer, ...]  # the most uneven inputs first
    num_sequences: int
    num_tokens: int
    device: str
    num_skipped: int = 0  # rows that the model's template or tokenizer refuses
    why_skipped: str = ""  # of the first of them


@dataclass(frozen=True)
class _Scored:
    own: torch.Tensor  # log-probabilities of the texts' tokens, float32 [T]
    best: torch.Tensor  # likeliest token at each place [T]

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.own.mean()))


def measure(
    model: Path, data: Path | None, *, trust: bool = False, say: Callable[[str], None] = lambda text: None
) -> QuantizationReport:
    """`data`: rows as training takes them; by default texts of ours. Raises ConfigError and DataError."""
    check_model_folder(model)
    if read_model_config(model).get("quantization_config"):
        raise ConfigError(f"{model}: is quantized already; name the 16-bit model")
    skipped: list[str] = []
    sequences = list(_sequences(data or TEXTS, ChatRenderer.load(model), skipped))
    if not sequences:
        why = f"; rows skipped: {len(skipped)}, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{data or TEXTS}: holds no text of two tokens or more{why}")
    expected: _Scored | None = None
    layers: list[Layer] = []
    kinds, device = [], ""
    for kind, bits in KINDS.items():
        say(f"{kind}: loading and measuring")
        loaded = _on_device(load_base(model, dtype=_dtype(kind, model), bits=bits, trust_remote_code=trust).eval())
        num_bytes = _num_bytes(loaded)  # before it runs: on some CPUs inference repacks nf4 weights
        scored = _score(loaded, sequences)
        if expected is None:
            expected, layers = scored, find_outliers(loaded, sequences)
        kinds.append(
            Kind(
                kind=kind,
                num_bytes=num_bytes,
                perplexity=scored.perplexity,
                same_tokens=float((scored.best == expected.best).float().mean()),
                gap=float((scored.own - expected.own).abs().mean()),
                tokens_per_s=_speed(loaded, sequences[0]),
            )
        )
        device = loaded.device.type
        del loaded
    return QuantizationReport(
        model=model.name,
        kinds=tuple(kinds),
        layers=tuple(layers),
        num_sequences=len(sequences),
        num_tokens=sum(map(len, sequences)),
        device=device,
        num_skipped=len(skipped),
        why_skipped=skipped[0] if skipped else "",
    )


def _on_device(model: Any) -> Any:
    """bitsandbytes puts what it quantizes on the GPU by itself; the others belong beside it, or speeds say nothing."""
    is_there = not torch.cuda.is_available() or model.device.type == "cuda"
    return model if is_there else model.to("cuda")


def _dtype(kind: str, model: Path) -> torch.dtype:
    """Of what is not quantized, and what quantized layers compute in: the saved one, but no fp16, which CPUs lack."""
    if kind == "fp32":
        return torch.float32
    if kind == "bf16":
        return torch.bfloat16
    return torch.float32 if saved_dtype(model) == torch.float32 else torch.bfloat16


def _sequences(data: Path, renderer: ChatRenderer, skipped: list[str]) -> Iterator[list[int]]:
    """Adds to `skipped` why a row cannot be used."""
    count = 0
    for row in read_rows([str(data)]):
        if isinstance(row, LedgerLine) or count == MAX_SEQUENCES:
            continue
        try:
            ids = _token_ids(row, renderer)
        except (TemplateError, TextError) as error:
            skipped.append(f"{error} ({row.source}, line {row.line})")
            continue
        if len(ids) > 1:
            count += 1
            yield ids[:MAX_TOKENS]


def _token_ids(row: Row, renderer: ChatRenderer) -> list[int]:
    """Raises TemplateError and TextError."""
    if row.messages:
        return renderer.render(row.messages, add_generation_prompt=False)
    return renderer.tokenizer.encode_plain(row.text)


@torch.no_grad()
def _score(model: Any, sequences: Sequence[Sequence[int]]) -> _Scored:
    own, best = [], []
    for ids in sequences:
        tokens = torch.tensor([list(ids)], device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        own.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].cpu())
        best.append(logits.argmax(-1).cpu())
    return _Scored(torch.cat(own), torch.cat(best))


def _num_bytes(model: Any) -> int:
    """Of all weights as they lie in memory, quantization constants included; tied ones count once."""
    tensors = {
        (value.data_ptr(), value.shape): value.numel() * value.element_size()
        for value in model.state_dict().values()
        if isinstance(value, torch.Tensor)
    }
    return sum(tensors.values())


def _speed(model: Any, prompt: Sequence[int]) -> float:
    """Tokens per second of one greedy answer, prompt included in the time; a short answer before it warms up."""
    ids = torch.tensor([list(prompt)], device=model.device)
    for count in (2, SPEED_TOKENS):
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
    return SPEED_TOKENS / (time.perf_counter() - begin)
