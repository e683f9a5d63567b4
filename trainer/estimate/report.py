"""The answer as text for people, and as a dictionary for programs."""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.estimate.ladder import SPEED, Rung
from trainer.estimate.probe import Probe
from trainer.estimate.reserve import GIB
from trainer.estimate.room import Room
from trainer.estimate.rules import rule_lines
from trainer.estimate.serving import Serving, ServingNeeds
from trainer.estimate.shape import ModelShape
from trainer.estimate.training import Device, load_format
from trainer.estimate.verdict import Cure, TrainingEstimate

WHAT = {
    "weights": "the model itself",
    "adapter": "the small matrices that are trained",
    "other models": "reference and reward models",
    "gradients": "one per trained number",
    "optimizer": "AdamW's two averages per trained number",
    "activations": "kept for the backward pass; grow with batch and length",
    "loss": "output layer and loss, in chunks",
    "never together": "activations are gone by the time all gradients are there",
    "buffers": "for sending between GPUs",
    "reserve": "interpreter and libraries, or CUDA and its allocator",
    "reading the file": "beside the weights, while they are loaded",
    "KV cache": "what the conversations have said so far",
    "adapters": "of the registry, kept ready",
    "working memory": "of one step",
}


def training_lines(found: TrainingEstimate, device: Device, cure: Cure | None, probe: Probe | None) -> Iterator[str]:
    """For a person who wants to know whether it will run."""
    config, shape, run = found.config, found.shape, found.run
    yield (
        f"a model of {shape.num_parameters:,} parameters in {load_format(config, shape, device)[0]}; "
        f"{config.stage}, {config.finetuning_type}: {found.needs.num_trained:,} numbers are trained"
    )
    source = "the largest of your rows" if found.knows_rows else "if rows are as long as max_length allows"
    yield f"largest forward pass: {run.rows} x {run.width} tokens, {source}"
    if not shape.is_exact:
        yield f"{shape.model_type}: parameters are exact, activations approximate"
    yield ""
    yield from table(parts_of(found), "all on one device" if found.chosen is None else f"rung {found.chosen.title}")
    if found.rungs:
        yield ""
        yield from ladder_lines(found)
    yield ""
    yield from verdict_lines(found, cure)
    if probe:
        yield ""
        yield from probe.lines(found.needs.peak if found.chosen is None else None)
    yield ""
    whole, chunks = found.needs.whole_logits / GIB, found.needs.chunk_logits / GIB
    yield f"logits: {chunks:.2f} GiB in chunks here; {whole:.2f} GiB in a tool that keeps all of them"
    yield "rules of thumb for this model:"
    yield from (f"  {line}" for line in rule_lines(shape))


def parts_of(found: TrainingEstimate) -> dict[str, int]:
    """The parts of the peak. On a CPU reading the file may be more than training."""
    if found.chosen is not None:
        return {name: size for name, size in found.chosen.parts.items() if size}
    needs = found.needs
    if needs.load > needs.step:
        parts = {"weights": needs.weights, "other models": needs.others, "reading the file": needs.loading}
    else:
        parts = {
            "weights": needs.weights,
            "adapter": needs.adapter,
            "other models": needs.others,
            "gradients": needs.gradients,
            "optimizer": needs.optimizer,
            "activations": needs.activations,
            "loss": needs.loss,
            "never together": -needs.swapped,
        }
    parts["reserve"] = needs.peak - sum(parts.values())
    return {name: size for name, size in parts.items() if size}


def table(parts: Mapping[str, int], title: str) -> Iterator[str]:
    yield f"{'part':18} {'GiB':>8}   {title}"
    for name, size in parts.items():
        yield f"{name:18} {size / GIB:8.2f}   {WHAT.get(name, '')}"
    yield f"{'sum':18} {sum(parts.values()) / GIB:8.2f}"


def ladder_lines(found: TrainingEstimate) -> Iterator[str]:
    yield f"ZeRO, fastest first ({SPEED}), on {found.room.name}:"
    first = found.first_fit
    for rung in found.rungs:
        mark = "fits" if _fits(rung, found.room) else "does not fit"
        mark += "  <- the first that fits" if rung is first else ""
        why = f" ({rung.refused})" if rung.refused else ""
        host = f" + {rung.host / GIB:7.2f} GiB of main memory" if rung.host else ""
        yield f"  {rung.title:12} {rung.device / GIB:8.2f} GiB per GPU{host}   {mark}{why}"


def verdict_lines(found: TrainingEstimate, cure: Cure | None) -> Iterator[str]:
    have = f"{found.room.device / GIB:.1f} GiB of {found.room.name}"
    if found.not_judged:
        yield f"not judged: {found.not_judged}"
        yield "next: compare the figures above with what you have, or measure a few steps with --probe"
        return
    if found.fits:
        yield f"fits: {found.bytes / GIB:.1f} GiB at the peak, within {have}"
        yield "next: start it with `python -m trainer train` and the same words"
        return
    yield f"does not fit, because {found.bytes / GIB:.1f} GiB are needed at the peak and there are {have}"
    if found.first_fit:
        yield f"next: deepspeed={found.first_fit.name}, which needs {found.first_fit.device / GIB:.1f} GiB per GPU"
    elif cure:
        yield f"next: {cure}, which needs {cure.bytes / GIB:.1f} GiB"
    else:
        yield "next: a smaller model, or a machine with more memory; no option of ours is enough"


def serving_lines(shape: ModelShape, asked: Serving, needs: ServingNeeds, room: Room) -> Iterator[str]:
    """For a person who wants to serve."""
    yield (
        f"{shape.num_parameters:,} parameters in {asked.number}; {asked.concurrency} conversations of "
        f"{asked.context:,} tokens; KV cache {needs.per_token / 1024:.1f} KiB per token"
    )
    yield ""
    yield from table(needs.parts, "serving" + (f", {room.num_gpus} GPUs together" if room.num_gpus > 1 else ""))
    yield ""
    have = f"{room.all_devices / GIB:.1f} GiB of {room.name}"
    left = room.all_devices - (needs.total - needs.parts["KV cache"])
    most = max(0, left) // (needs.per_token * asked.context)
    if needs.total <= room.all_devices:
        yield f"fits: {needs.total / GIB:.1f} GiB, within {have}"
        yield f"next: up to {most:,} such conversations would fit"
    else:
        yield f"does not fit, because {needs.total / GIB:.1f} GiB are needed and there are {have}"
        yield (
            f"next: {most:,} such conversations would fit"
            if most
            else "next: a smaller format (--dtype int8 or nf4), a shorter --context, or more memory"
        )
    yield ""
    yield "rules of thumb for this model:"
    yield from (f"  {line}" for line in rule_lines(shape))


def training_json(found: TrainingEstimate, cure: Cure | None, probe: Probe | None) -> dict[str, Any]:
    return {
        "parameters": found.shape.num_parameters,
        "trained": found.needs.num_trained,
        "pass": {"rows": found.run.rows, "width": found.run.width, "from_rows": found.knows_rows},
        "parts": parts_of(found),
        "bytes": found.bytes,
        "step_bytes": found.needs.step,
        "load_bytes": found.needs.load,
        "room": {"gpus": found.room.num_gpus, "bytes": found.room.device, "host_bytes": found.room.host},
        "fits": found.fits,
        "not_judged": found.not_judged or None,
        "rungs": [
            {
                "name": rung.name,
                "bytes": rung.device,
                "host_bytes": rung.host,
                "fits": _fits(rung, found.room),
                "refused": rung.refused,
            }
            for rung in found.rungs
        ],
        "first_fit": found.first_fit.name if found.first_fit else None,
        "cure": cure.changes if cure else None,
        "whole_logits_bytes": found.needs.whole_logits,
        "rules": rule_lines(found.shape),
        "probe": probe.as_json() if probe else None,
    }


def serving_json(shape: ModelShape, asked: Serving, needs: ServingNeeds, room: Room) -> dict[str, Any]:
    return {
        "parameters": shape.num_parameters,
        "context": asked.context,
        "concurrency": asked.concurrency,
        "kv_bytes_per_token": needs.per_token,
        "parts": needs.parts,
        "bytes": needs.total,
        "fits": needs.total <= room.all_devices,
        "room": {"gpus": room.num_gpus, "bytes": room.device},
    }


def _fits(rung: Rung, room: Room) -> bool:
    return not rung.refused and rung.device <= room.device and rung.host <= room.host
