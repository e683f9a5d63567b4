"""What a machine without a GPU cannot do, and what stands in for it when the user agrees (`cpu_ok`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.options.values import FLAGS

CPU_OPTIMIZERS = frozenset(
    {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "stable_adamw", "lion_32bit"}
)


@dataclass(frozen=True)
class Change:
    """`key` asked for `asked`; on a CPU it becomes `instead` (None: the option is left out)."""

    key: str
    asked: Any
    instead: Any
    why: str

    @property
    def fault(self) -> str:
        return f"{self.key}={_shown(self.asked)}: {self.why}; leave it out, or add --cpu-ok to train {self._without}"

    @property
    def note(self) -> str:
        instead = "fp32" if self.key == "fp16" else "left out" if self.instead is None else _shown(self.instead)
        return f"{self.key}: {_shown(self.asked)} -> {instead} (cpu_ok: {self.why})"

    @property
    def _without(self) -> str:
        if self.key == "fp16":
            return "in fp32"
        return "without it" if self.instead is None else f"with {_shown(self.instead)}"


def without_gpu(values: Mapping[str, Any], passed: Mapping[str, Any]) -> list[Change]:
    """Every option of `values` and every argument of `passed` (for TrainingArguments) that needs a GPU."""
    changes = []
    if values.get("fp16"):
        changes.append(Change("fp16", True, False, "there is no GPU, and a CPU has no fp16 arithmetic"))
    # With several processes named, DeepSpeed's engine runs on the CPU: slow, but a real trial. FSDP does not:
    # accelerate leaves it out on a CPU and says nothing.
    if values.get("deepspeed") and (values.get("num_processes") or 1) < 2:
        changes.append(Change("deepspeed", values["deepspeed"], None, "DeepSpeed splits work over GPUs, there is none"))
    if values.get("fsdp"):
        changes.append(Change("fsdp", values["fsdp"], None, "FSDP splits work over GPUs, there is none"))
    if values.get("attention") == "flash_attention_2":
        changes.append(Change("attention", "flash_attention_2", "auto", "flash attention needs a GPU"))
    if values.get("use_dora") and values.get("quantization_bit") == 8:
        changes.append(Change("quantization_bit", 8, 4, "use_dora on int8 layers needs a GPU"))
    optimizer = values.get("optim", "adamw_torch")
    if optimizer not in CPU_OPTIMIZERS:
        changes.append(Change("optim", optimizer, "adamw_torch", "this optimizer needs a GPU"))
    for name, why in (
        ("tf32", "tf32 is a number format of NVIDIA GPUs, there is none"),
        ("use_liger_kernel", "its kernels need a GPU"),
    ):
        if FLAGS.get(passed.get(name)):
            changes.append(Change(name, True, None, why))
    return changes


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
