"""A quantization report as text for a terminal and as Markdown."""

from collections.abc import Iterator

from trainer.quantization.outliers import THRESHOLD
from trainer.quantization.report import QuantizationReport

HEAD = ("kind", "MiB", "perplexity", "same token as fp32", "gap, nat", "tokens/s")
LAYER_HEAD = ("layer", "largest input", "over median", f"inputs over {THRESHOLD:g}", "weight ratio", "int8 error")
NUM_LAYERS = 10


def rows(report: QuantizationReport) -> Iterator[tuple[str, ...]]:
    for kind in report.kinds:
        yield (
            kind.kind,
            f"{kind.num_bytes / 2**20:,.1f}",
            f"{kind.perplexity:.3f}",
            f"{100 * kind.same_tokens:.1f} %",
            f"{kind.gap:.4f}",
            f"{kind.tokens_per_s:.1f}",
        )


def layer_rows(report: QuantizationReport) -> Iterator[tuple[str, ...]]:
    for layer in report.layers[:NUM_LAYERS]:
        yield (
            layer.name,
            f"{layer.largest_input:.2f}",
            f"{layer.input_ratio:.1f}",
            str(layer.num_outliers),
            f"{layer.weight_ratio:.1f}",
            f"{100 * layer.int8_error:.2f} %",
        )


def text(report: QuantizationReport) -> str:
    parts = [_aligned([HEAD, *rows(report)]), _aligned([LAYER_HEAD, *layer_rows(report)]), _basis(report)]
    return "\n\n".join(parts)


def markdown(report: QuantizationReport) -> str:
    parts = [f"# {report.model}: fp32, bf16, int8 and nf4", _table(HEAD, rows(report)), "## Outlier layers"]
    return "\n\n".join([*parts, _table(LAYER_HEAD, layer_rows(report)), _basis(report)]) + "\n"


def _basis(report: QuantizationReport) -> str:
    measured = f"{report.num_sequences} texts, {report.num_tokens:,} tokens, on {report.device}"
    error = (
        "int8 error: the largest of an output, over the outputs' root mean square, with all inputs in int8, of a few "
        "tokens of each text"
    )
    skipped = f"rows skipped: {report.num_skipped}, the first: {report.why_skipped}.\n" if report.num_skipped else ""
    return f"{measured}; int8 and nf4 by bitsandbytes.\n{skipped}{error}."


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _table(head: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> str:
    shown = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    shown.insert(1, "|" + " --- |" * len(head))
    return "\n".join(shown)
