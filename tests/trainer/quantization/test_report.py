"""The quantization report: figures of a model that is known, outliers that were planted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from server.errors import ConfigError
from server.store.home import Home
from trainer.__main__ import main
from trainer.errors import DataError
from trainer.quantization.outliers import _Seen, find_outliers
from trainer.quantization.report import measure
from trainer.quantization.tables import text


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
    assert plain.int8_error == pytest.approx(_int8_error(toy, [1, 2, 3, 4, 5, 6]), rel=1e-4)
    weight = toy.plain.weight.detach()
    assert plain.weight_ratio == pytest.approx(float(weight.abs().max() / weight.square().mean().sqrt()))


def test_an_outlier_of_the_second_text_is_in_the_int8_error() -> None:
    toy = Toy()
    with torch.no_grad():
        toy.embed.weight[9, 4] = 50
    first, second = [1, 2, 3, 4], [*([5, 6, 7, 8] * 4), 9]
    errors = {layer.name: layer.int8_error for layer in find_outliers(toy, [first, second])}
    assert errors["plain"] == pytest.approx(_int8_error(toy, [*first, *second]), rel=1e-4)
    assert errors["plain"] > 2 * _int8_error(toy, first)


def test_of_a_long_text_few_tokens_are_kept_and_the_largest_is_one_of_them() -> None:
    toy = Toy()
    with torch.no_grad():
        toy.embed.weight[9, 4] = 50
    seen = _Seen(spread=8)
    seen.add(toy.embed(torch.tensor([[1, 2, 3, 4] * 75])))
    seen.add(toy.embed(torch.tensor([[1, 2, 3, 4] * 30 + [9] + [5, 6] * 60])))
    assert [len(rows) for rows in seen.kept] in ([8, 9], [9, 9])
    assert float(seen.kept[1].max()) == 50


def _int8_error(toy: Toy, tokens: list[int]) -> float:
    """As bitsandbytes' Linear8bitLt computes it, number by number."""
    inputs, weight = toy.embed.weight[tokens].tolist(), toy.plain.weight.tolist()

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


REFUSES_SYSTEM = """\
{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{ message.content }}{% endfor %}"""


def test_conversations_that_the_template_refuses_are_skipped_and_counted(model_folder: Path, tmp_path: Path) -> None:
    folder, data = shutil.copytree(model_folder, tmp_path / "m"), tmp_path / "d.jsonl"
    (folder / "chat_template.jinja").write_text(REFUSES_SYSTEM, encoding="utf-8")
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A demo."}]
    refused = {"messages": [{"role": "system", "content": "Be kind."}, *turns]}
    data.write_text("\n".join(json.dumps(row) for row in (refused, {"messages": turns}, refused)), encoding="utf-8")
    report = measure(folder, data)
    assert (report.num_sequences, report.num_skipped) == (1, 2)
    assert f"\nrows skipped: 2, the first: no system ({data}, line 1).\n" in text(report)
    data.write_text(json.dumps(refused), encoding="utf-8")
    with pytest.raises(DataError, match=r"no text of two tokens or more; rows skipped: 1, the first: no system"):
        measure(folder, data)


def test_conversations_and_a_base_without_a_template(model_folder: Path, tmp_path: Path) -> None:
    folder, data = shutil.copytree(model_folder, tmp_path / "m"), tmp_path / "d.jsonl"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A demo."}]
    data.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows skipped: 1, the first: this model has no chat template"):
        measure(folder, data)


def test_a_quantized_folder_is_refused(model_folder: Path, home: Home, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ConfigError, match="is quantized already"):
        measure(folder, None)
