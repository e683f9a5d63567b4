"""The options of a configuration while its places are laid over each other: translated, completed, not yet checked.

Knows no default and no type; wrong values wait for `trainer.options.resolve`.
"""

from collections.abc import Mapping
from typing import Any

from server.errors import ConfigError
from trainer.machine import Machine
from trainer.options.checks import PREFIX_METHODS
from trainer.options.cpu import without_gpu
from trainer.options.dataset_info import dataset_files
from trainer.options.hf_table import hf_table
from trainer.options.shell_file import UNSET
from trainer.options.sources import COMMAND_LINE, Layer
from trainer.options.translate import (
    ALSO,
    HELPERS,
    HINTS,
    OPTIONS,
    UnknownOption,
    is_known,
    shown,
    translate,
)
from trainer.options.values import BadValue, convert

MAPPINGS = ("hf_arguments", "peft_config")


class Draft:
    """The options so far, and all that is wrong with them. One instance resolves one configuration."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.names: dict[str, str] = {}  # option -> the name that the user wrote
        self._helpers: dict[str, Any] = {}
        self.notes: dict[str, tuple[str, tuple[str, ...]]] = {}  # key -> line, the options that it is about
        self.faults: list[str] = []

    def add(self, layer: Layer) -> None:
        """Lay the options of one place over those before."""
        for line in layer.notes:
            self.note(line, line)
        here: dict[str, tuple[str, Any]] = {}
        for key, raw in layer.values.items():
            place = "" if layer.place == COMMAND_LINE else f"{layer.where(key)}: "
            for name, value in self._translated(key, raw, place).items():
                first = here.get(name)
                if first and name not in MAPPINGS and not _agree(name, first[1], value):
                    self.faults.append(
                        f"{place}{name} is given twice: {first[0]}={shown(first[1])} and {key}={shown(value)}"
                    )
                elif first and name == "warmup_steps" and not _is_set(value):
                    continue
                here[name] = (key, value)
                self._put(name, value, key, layer.where(key))

    def _translated(self, key: str, raw: Any, place: str) -> Mapping[str, Any]:
        if isinstance(raw, str) and UNSET in raw and is_known(key):
            return {ALSO.get(key, key): raw} if key in OPTIONS or key in ALSO else {}
        try:
            done = translate(key, raw)
        except UnknownOption as error:
            self.faults.append(f"{place}{error}")
            return {}
        except BadValue as error:
            self.faults.append(f"{place}{key}={shown(raw)}: {error}")
            return {}
        self.note(key, done.note, *done.options)
        return done.options

    def note(self, key: str, line: str, *options: str) -> None:
        """One line per key; the last place that names it has the word."""
        self.notes.pop(key, None)
        if line:
            self.notes[key] = (line, options)

    def told(self) -> tuple[str, ...]:
        """The notes, without those on options that another place has set since."""
        return tuple(
            line
            for key, (line, options) in self.notes.items()
            if not options or any(self.names.get(name, key) == key for name in options)
        )

    def _put(self, name: str, value: Any, key: str, source: str) -> None:
        if name in HELPERS:
            self._helpers[name] = value
            return
        if name in MAPPINGS and isinstance(value, dict):
            value = {**self.values.get(name, {}), **value}
        self.values[name] = value
        self.names[name] = key
        self.sources[name] = source + (f" ({key})" if key != name else "")

    def set_stage(self, stage: str) -> None:
        """The command names the stage; a file that names another one is a fault."""
        before = self.values.get("stage", stage)
        if before != stage:
            self.faults.append(f"{self.sources['stage']}: stage={before}, but the command is {stage}")
        self._put("stage", stage, "stage", f"the command {stage}")

    def derive(self) -> None:
        """What follows from the options together."""
        self._find_datasets()
        self._find_offload()
        values = self.values
        if "finetuning_type" not in values:
            self._find_method()
        if values.get("finetuning_type") == "qlora" and "quantization_bit" not in values:
            self._follow("quantization_bit", 4, "finetuning_type=qlora")
        if "max_length" not in values and {"max_source_length", "max_target_length"} <= values.keys():
            both = [str(values[name]) for name in ("max_source_length", "max_target_length")]
            if all(number.isdigit() for number in both):
                self._follow("max_length", sum(map(int, both)), "max_source_length + max_target_length")

    def _follow(self, name: str, value: Any, why: str) -> None:
        self.values[name] = value
        self.sources[name] = f"from {why}"
        self.note(f"from {why}", f"{name}: {shown(value)} (from {why})")

    def _find_datasets(self) -> None:
        for name in ("train_file", "val_file"):
            given = self._loose(name)
            if not given or self.names[name] not in ("dataset", "datasets", "eval_dataset"):
                continue
            try:
                files = dataset_files(given, self._helpers.get("dataset_dir"))
            except ConfigError as error:
                self.faults.append(str(error))
                continue
            if files != given:
                self.note(f"{name} files", f"{name}: {shown(given)} -> {shown(files)}")
                self.values[name] = files

    def _find_offload(self) -> None:
        if str(self._helpers.get("offload", False)).lower() != "true":
            return
        stage = self.values.get("deepspeed")
        if stage in ("zero2", "zero3"):
            self._follow("deepspeed", f"{stage}_offload", "offload")
        elif not str(stage).endswith("offload"):
            self.faults.append(f"offload=true needs zero_stage 2 or 3; deepspeed is {shown(stage)}")

    def _find_method(self) -> None:
        if "pre_seq_len" in self.values:
            self._follow("finetuning_type", "ptuning_v2", self.names["pre_seq_len"])
        elif self.values.get("peft_config"):
            self._follow("finetuning_type", "peft", "peft_config")
        elif self.values.get("deepspeed") and not any(name.startswith(("lora_", "quant")) for name in self.values):
            # Scripts that name no method, as those made for DeepSpeed do, train all weights.
            self._follow("finetuning_type", "full", "deepspeed, with no method named")

    def fit(self, machine: Machine) -> None:
        """Settings that need a GPU stop the run on a CPU, or are replaced where cpu_ok says so."""
        passed = self._loose("hf_arguments") or {}
        if machine.num_gpus and passed.get("use_cpu") is not True:
            if "gradient_checkpointing" not in self.values and self._loose("finetuning_type") not in PREFIX_METHODS:
                self.values["gradient_checkpointing"] = True
                self.sources["gradient_checkpointing"] = "from the GPU"
            return
        names = ("fp16", "deepspeed", "fsdp", "num_processes", "attention", "optim", "use_dora", "quantization_bit")
        given = {name: value for name in names if (value := self._loose(name)) is not None}
        if given.get("optim") not in hf_table().optimizers:
            given.pop("optim", None)  # told in `resolve`
        for change in without_gpu(given, passed):
            if not self._loose("cpu_ok"):
                self.faults.append(change.fault)
                self.values.pop(change.key, None)  # told once is enough
                continue
            self.note(f"{change.key} on a CPU", change.note)
            if change.key in passed:
                passed = {key: value for key, value in passed.items() if key != change.key}
                self.values["hf_arguments"] = passed
            else:
                self.values[change.key] = change.instead
                self.sources[change.key] = "cpu_ok"

    def _loose(self, name: str) -> Any:
        """The value as its type if it can be read so, else None: wrong values are told in `resolve`."""
        try:
            return convert(self.values[name], HINTS[name]) if name in self.values else None
        except BadValue:
            return None


def _agree(name: str, first: Any, second: Any) -> bool:
    """Equal values agree; of warmup_steps and warmup_ratio the one that is not 0 counts, as in transformers."""
    if name == "warmup_steps" and not (_is_set(first) and _is_set(second)):
        return True
    return str(first) == str(second)


def _is_set(value: Any) -> bool:
    return str(value) not in ("0", "0.0", "", "None")
