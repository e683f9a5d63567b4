"""The quantization report: figures of a model that is known, outliers that were planted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from server.errors import ConfigError
from server.store.home import Home
from trainer.__main__ import main
from trainer.quantization.outliers import find_outliers
from trainer.quantization.report import measure


class Toy(nn.Module):
    """Two linear maps; the second one's third input feature is 100 times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.plain, self.hard = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        inputs = self.embed(input_ids)
        large = inputs.clone()
        large[..., 2] *= 100
        out: torch.Tensor = self.plain(inputs) + self.hard(large)
        return out


def test_a_planted_outlier_is_found() -> None:
    toy = Toy()
    layers = find_outliers(toy, [[1, 2, 3, 4], [5, 6]])
    assert [layer.name for layer in layers] == ["hard", "plain"]
    hard, plain = layers
    seen = toy.embed.weight.detach()[1:7].abs().amax(0)
    assert hard.largest_input == pytest.approx(float(100 * seen[2])) and hard.num_outliers == 1
    assert plain.largest_input == pytest.approx(float(seen.max())) and plain.num_outliers == 0
    assert hard.input_ratio > 20 > plain.input_ratio
    assert plain.int8_error == pytest.approx(_int8_error(toy), rel=1e-4)
    weight = toy.plain.weight.detach()
    assert plain.weight_ratio == pytest.approx(float(weight.abs().max() / weight.square().mean().sqrt()))


def _int8_error(toy: Toy) -> float:
    """As bitsandbytes' Linear8bitLt computes it, number by number."""
    inputs, weight = toy.embed.weight[1:5].tolist(), toy.plain.weight.tolist()  # the tokens of the first sequence

    def rounded(row: list[float]) -> list[float]:
        scale = max(map(abs, row)) / 127
        return [round(value / scale) * scale for value in row]

    worst, squares = 0.0, []
    for row in inputs:
        for column in weight:
            exact = sum(a * b for a, b in zip(row, column, strict=True))
            found = sum(a * b for a, b in zip(rounded(row), rounded(column), strict=True))
            worst, squares = max(worst, abs(exact - found)), [*squares, exact**2]
    return worst / (sum(squares) / len(squares)) ** 0.5


def test_the_four_kinds_of_one_model(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "The quick brown fox jumps."}\n{"text": "你好，世界。"}\n', encoding="utf-8")
    words = ["quantization", str(model_folder), "--data", str(data), "--home", str(tmp_path / "h")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "quantization.json").read_text("utf-8"))
    kinds = {kind["kind"]: kind for kind in report["kinds"]}
    assert list(kinds) == ["fp32", "bf16", "int8", "nf4"]
    sizes = [kind["num_bytes"] for kind in kinds.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] == sizes[0] // 2
    assert (kinds["fp32"]["same_tokens"], kinds["fp32"]["gap"]) == (1.0, 0.0)
    assert 0 < kinds["bf16"]["gap"] < kinds["nf4"]["gap"] and kinds["nf4"]["same_tokens"] < 1
    assert all(kind["tokens_per_s"] > 0 and kind["perplexity"] > 1 for kind in kinds.values())
    assert len(report["layers"]) == 15  # 7 in each of 2 layers, and the head
    told = capsys.readouterr().out
    assert "nf4" in told and (tmp_path / "out" / "quantization.md").read_text("utf-8").startswith("# ")


def test_perplexity_is_that_of_transformers(model_folder: Path, tmp_path: Path) -> None:
    from tests.server.engine.backends.folders import load_reference

    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "The quick brown fox jumps over it."}\n', encoding="utf-8")
    ids = torch.tensor([list(b"The quick brown fox jumps over it.")])
    from server.text.render import ChatRenderer

    own = ChatRenderer.load(model_folder).tokenizer.encode_plain("The quick brown fox jumps over it.")
    assert len(own) == ids.shape[1]
    tokens = torch.tensor([own])
    with torch.no_grad():
        loss = float(load_reference(model_folder)(input_ids=tokens, labels=tokens).loss)
    assert measure(model_folder, data).kinds[0].perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


def test_a_quantized_folder_is_refused(model_folder: Path, home: Home, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ConfigError, match="is quantized already"):
        measure(folder, None)
