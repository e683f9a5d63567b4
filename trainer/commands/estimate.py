"""`estimate`: how much memory a run or a server needs, whether it fits, and with --probe how long it takes."""

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import resolve_model
from trainer.commands.data_options import count
from trainer.commands.train import add_configured, resolve_words

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.estimate.room import Room
    from trainer.estimate.training import Device

FITS, FITS_NOT = 0, 6
CONTEXT, CONCURRENCY = 4096, 8
DESCRIPTION = """\
Memory by part, whether it fits, and if not the smallest change that makes it fit. No weights are read. Exit code 0: it
fits, as it is or on a rung of the ladder; 6: it does not.
"""
SERVING = """\
a model, or a configuration that names one:
python -m trainer estimate --serve Qwen/Qwen2-7B-Instruct --context 8192 --concurrency 16 --gpus 1x24GB
"""
MODEL_KEYS = ("model_name_or_path=", "model=")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    parser = add_configured(commands, shared, "estimate", "how much memory and time a run or a server needs")
    parser.description = DESCRIPTION
    parser.add_argument("--gpus", metavar="2x24GB", help="these GPUs instead of this machine's")
    parser.add_argument("--probe", type=count, metavar="N", help="run N real steps: seconds per epoch, hours in all")
    parser.add_argument("--no-data", action="store_true", help="take max_length, do not read the rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--serve", action="store_true", help="a server instead of a run")
    serve = parser.add_argument_group("with --serve", SERVING)
    serve.add_argument("--context", type=count, metavar="N", help="tokens of a conversation [4096, or all it has]")
    serve.add_argument("--concurrency", type=count, metavar="N", help="conversations at once [8]")
    serve.add_argument("--dtype", help="fp32, bf16, fp16, int8 or nf4 [the model's own]")
    serve.add_argument("--kv-dtype", help="of the KV cache, also fp8 [as the weights]")
    serve.add_argument("--adapters", type=count, metavar="N", help="adapters kept ready [0]")
    parser.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace, home: Home) -> int:
    """Nothing is accepted and ignored: what belongs to the other question is refused."""
    other = ("probe", "no_data") if options.serve else ("context", "concurrency", "dtype", "kv_dtype", "adapters")
    if given := [name for name in other if getattr(options, name)]:
        where = "goes without --serve" if options.serve else "goes with --serve"
        raise ConfigError(f"--{given[0].replace('_', '-')}: {where}")
    if options.probe and options.gpus:
        raise ConfigError("--probe: its steps run on this machine, and --gpus names another; give one of the two")
    return _serving(options, home) if options.serve else _training(options, home)


def _training(options: argparse.Namespace, home: Home) -> int:
    from trainer.estimate.probe import probe
    from trainer.estimate.report import training_json, training_lines
    from trainer.estimate.rows import Rows, read_lengths
    from trainer.estimate.verdict import estimate_training, find_cure, read_models

    room = _room(options)
    resolved = resolve_words(options.words, machine=_as_machine(room))
    config = resolved.config
    base = resolve_model(config.model_name_or_path, home, with_weights=bool(options.probe))
    rows = Rows() if options.no_data else read_lengths(config, base)
    device = _device(config, room)
    found = estimate_training(config, base, room, rows, device, read_models(config, base, home))
    cure = None if found.fits or found.first_fit else find_cure(found, base, rows, device)
    measured = probe(resolved, options.probe, home) if options.probe else None
    if options.json:
        print(json.dumps(training_json(found, cure, measured)))
    else:
        _print(training_lines(found, device, cure, measured))
    return FITS if found.fits or found.first_fit else FITS_NOT


def _serving(options: argparse.Namespace, home: Home) -> int:
    from trainer.estimate.report import serving_json, serving_lines
    from trainer.estimate.serving import Serving, serving_needs
    from trainer.estimate.verdict import read_shape

    room = _room(options)
    base = resolve_model(_model_of(options.words), home, with_weights=False)
    shape = read_shape(base)
    asked = Serving(
        context=options.context or min(CONTEXT, shape.most_positions or CONTEXT),
        concurrency=options.concurrency or CONCURRENCY,
        number=options.dtype or _saved_format(base, room),
        kv=options.kv_dtype or "",
        adapters=options.adapters or 0,
    )
    needs = serving_needs(shape, asked, num_gpus=room.num_gpus)
    if options.json:
        print(json.dumps(serving_json(shape, asked, needs, room)))
    else:
        _print(serving_lines(shape, asked, needs, room))
    return FITS if needs.total <= room.all_devices else FITS_NOT


def _room(options: argparse.Namespace) -> "Room":
    from trainer.estimate.room import named_gpus, this_machine
    from trainer.machine import find_machine

    room = named_gpus(options.gpus) if options.gpus else this_machine(find_machine())
    if room.device <= 0:
        raise ConfigError("this machine does not say how much memory is free; name it, for example --gpus 1x24GB")
    return room


def _as_machine(room: "Room") -> Any:
    """So that the settings of a GPU are not refused where --gpus names some."""
    from trainer.machine import Machine

    return Machine(("NVIDIA GPU",) * room.num_gpus)


def _device(config: "TrainConfig", room: "Room") -> "Device":
    """GPUs that are named are taken to have bf16. On a CPU the interpreter's size is that of this process."""
    import trainer.train  # noqa: F401  # what training imports, so that it counts
    from trainer.estimate.reserve import CPU_PROCESS, process_bytes
    from trainer.estimate.training import Device

    return Device(room.on_cpu, not room.on_cpu, process_bytes() or CPU_PROCESS)


def _model_of(words: list[str]) -> str:
    """A configuration's model, or the one word that names it."""
    if any(word.endswith((".json", ".yaml", ".yml", ".sh")) for word in words):
        return resolve_words(words).config.model_name_or_path
    if len(words) != 1:
        raise ConfigError("--serve needs one model: a folder, a name in the home, a hub id, or a configuration")
    key = next((key for key in MODEL_KEYS if words[0].startswith(key)), "")
    return words[0].removeprefix(key)


def _saved_format(base: Any, room: "Room") -> str:
    """The dtype that config.json names; a server on a CPU computes fp16 weights in fp32."""
    from server.store.model_folder import read_model_config, saved_format
    from trainer.estimate.weights import SHORT_NAMES

    number = SHORT_NAMES.get(saved_format(read_model_config(base)), "fp32")
    return "fp32" if room.on_cpu and number == "fp16" else number


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
