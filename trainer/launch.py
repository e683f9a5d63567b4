"""One process on no or one GPU; otherwise this command again under torch.distributed.run, one process per device.

Several machines: start the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, as
LLaMA-Factory does. NPROC_PER_NODE is the same as num_processes. How the processes ended comes back through a file:
torch.distributed.run turns every failure into 1, and what all of them have to say is told once.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from trainer.config import TrainConfig
from trainer.errors import ConfigFaults, DoesNotFit, Stopped
from trainer.machine import Machine, gpu_holders, num_cores
from trainer.methods.plan import base_bits
from trainer.options.checks import TRL_STAGES

END_FILE = "TRAINER_END_FILE"
NCCL_OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def launch(config: TrainConfig, machine: Machine, arguments: Sequence[str]) -> int | None:
    """Run the command in several processes and return their exit code; None: this process is the one that trains.

    Raises ConfigError for what the environment says wrongly, DoesNotFit when the engine holds the GPU.
    """
    if is_child():
        return None
    check_packages(config)
    check_gpus_free(machine)
    command = torchrun_command(config, machine, arguments, os.environ)
    if command is None:
        os.environ.update(one_gpu(machine, os.environ))
        return None
    extra = nccl_settings(machine, os.environ)
    if extra:
        named = " ".join(f"{name}={value}" for name, value in extra.items())
        print(f"{named}: this GPU's driver has no peer-to-peer transfers ({machine.gpus[0]})", file=sys.stderr)
    return _run(command, extra)


def is_child() -> bool:
    """Whether torchrun (ours or the user's), deepspeed or accelerate started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def torchrun_command(
    config: TrainConfig, machine: Machine, arguments: Sequence[str], environment: Mapping[str, str]
) -> list[str] | None:
    """The command that starts all processes of this machine; None where one process is enough."""
    processes = _num_processes(config, machine, environment)
    nodes = _number(environment, "NNODES", 1)
    # DeepSpeed and FSDP want a process group even for one process.
    if processes * nodes == 1 and not config.deepspeed and not config.fsdp:
        return None
    places = ["--standalone"]
    if nodes > 1:
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
        if missing:
            raise ConfigError(f"NNODES={nodes} without {' and '.join(missing)}: set it on every machine")
        places = ["--nnodes", str(nodes), "--node_rank", str(_number(environment, "NODE_RANK", 0))]
        places += ["--master_addr", environment["MASTER_ADDR"]]
        places += ["--master_port", str(_number(environment, "MASTER_PORT", 29500))]
    head = [sys.executable, "-m", "trainer.agent", "--nproc_per_node", str(processes)]
    return [*head, *places, "--module", "trainer", *arguments]


def one_gpu(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """For a single process on a machine with several GPUs: torch would split each batch over all that it sees."""
    if machine.num_gpus < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()}


def nccl_settings(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """What NCCL must be told on boards without peer-to-peer, as far as the user has not said anything."""
    if machine.num_gpus < 2 or not machine.lacks_p2p:
        return {}
    return {name: value for name, value in NCCL_OFF.items() if name not in environment}


def check_packages(config: TrainConfig) -> None:
    """Raises ConfigFaults naming every option whose package is not installed, and how to install it."""
    faults = [
        f"{option}: the package {package} is not installed; pip install '{source}'"
        for is_used, option, package, source in _needs(config)
        if is_used and find_spec(package) is None
    ]
    if faults:
        raise ConfigFaults(faults)


def _needs(config: TrainConfig) -> list[tuple[bool, str, str, str]]:
    """Is it used, the option, its package, and what pip takes."""
    bits = base_bits(config)
    return [
        (config.stage in TRL_STAGES, f"stage={config.stage}", "trl", "qloop[preference]"),
        (bool(config.deepspeed), f"deepspeed={config.deepspeed}", "deepspeed", "qloop[deepspeed]"),
        (bool(bits), f"quantization_bit={bits}", "bitsandbytes", "qloop[bnb]"),
        (bool(config.hf_arguments.get("use_liger_kernel")), "use_liger_kernel=true", "liger_kernel", "liger-kernel"),
        *(
            (True, f"report_to={name}", name, "qloop[tensorboard]" if name == "tensorboard" else name)
            for name in config.report_to
        ),
    ]


def check_gpus_free(machine: Machine) -> None:
    """Raises DoesNotFit when an engine of ours holds a GPU: it takes nearly all of the memory."""
    if not machine.num_gpus:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    engine = next((holder for holder in gpu_holders() if holder.is_engine and holder.shares_gpus(visible)), None)
    if engine:
        raise DoesNotFit(
            f"the GPU ({machine.gpus[0]}) is held by the engine, process {engine.pid} (`{engine.command[:80]}`): stop "
            "the server first, or start each with a CUDA_VISIBLE_DEVICES of its own"
        )


def end(code: int, message: str = "") -> int:
    """Say how this process ended: to the launching one if there is one, else on stderr. Returns `code`."""
    file = os.environ.get(END_FILE)
    if not file:
        _complain(message)
    elif code:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps([code, message]) + "\n")
    return code


def _complain(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)


def _num_processes(config: TrainConfig, machine: Machine, environment: Mapping[str, str]) -> int:
    wanted = config.num_processes or _number(environment, "NPROC_PER_NODE", 0)
    if config.stage == "ppo" and not wanted:
        return 1
    on_cpu = machine.num_gpus == 0 or config.hf_arguments.get("use_cpu") is True
    if not on_cpu and wanted > machine.num_gpus:
        raise ConfigError(f"num_processes={wanted}: there are {machine.num_gpus} GPUs; name at most that many")
    return wanted or (1 if on_cpu else machine.num_gpus)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit():
        raise ConfigError(f"{name}={text}: a whole number is expected")
    return int(text)


def _run(command: list[str], extra: Mapping[str, str]) -> int:
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        file = Path(folder) / "ends"
        environment = {"OMP_NUM_THREADS": _threads(command), **os.environ, **extra, END_FILE: str(file)}
        # A session of its own: signals reach the ranks only, which save first, and not the launcher, which would kill.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        before = {number: signal.signal(number, _forward(child)) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return _ended(code, file)


def _threads(command: Sequence[str]) -> str:
    """Cores per process; torch.distributed.run would give each a single one."""
    processes = int(command[command.index("--nproc_per_node") + 1])
    return str(max(1, num_cores() // processes))


def _forward(child: "subprocess.Popen[bytes]") -> Any:
    def handler(number: int, _: Any) -> None:
        ranks = _children(child.pid)
        for pid in ranks or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return handler


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _ended(code: int, file: Path) -> int:
    """The first exit code that is no mere echo of another rank's end, and its message on stderr."""
    if code == 0:
        return 0
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    told = [(int(number), str(message)) for number, message in map(json.loads, lines)]
    if not told:
        return code if code > 0 else 128 - code
    number, message = next((end for end in told if end[0] != Stopped.exit_code), told[0])
    _complain(message)
    return number
