"""The settings of every process: declared once, read once, and the only reader of the environment.

Precedence: command line > environment > `.env` > `--config` file > default. The declarations below also make the
command-line options, `--print-config` and the settings table in the documentation, so none of them can disagree.
"""

import argparse
import difflib
import ipaddress
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.errors import ConfigError

PREFIX = "QLOOP_"
DEMO_MODEL = "qwen2-demo"
MODELSCOPE_VARIABLE = "VLLM_USE_MODELSCOPE"
CONFIG_VARIABLE = "QLOOP_CONFIG"
UNIX_PATH_BYTES = 107  # sun_path, unix(7)


def _split(value: Any) -> Any:
    """`a, b` -> ("a", "b"): lists are comma-separated in the environment."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _parse_object(value: Any) -> Any:
    """JSON text -> what it says; the field's type then asks for an object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _refuse_bitsandbytes(value: Any) -> Any:
    if value in ("bitsandbytes", "bnb", "nf4"):
        raise ValueError(
            "vLLM 0.32 has no bitsandbytes; serve it with QLOOP_ENGINE=hf and QLOOP_HF_DTYPE=nf4 or bnb-int8"
        )
    return value


class Settings(BaseModel):
    """What an operator can choose. Field names are the variables without `QLOOP_`, in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="Base model: a folder or a hub id. Unset: the demo model in the home.")
    served_model_name: str | None = Field(None, description="The base model's id in the API. Unset: its folder's name.")
    home: Path = Field(Path(".qloop"), description="Folder of models, adapters, runs, sockets and pid files.")
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs API keys.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the API and the pages.")
    workers: int = Field(2, ge=1, le=256, description="Number of HTTP workers.")
    api_keys: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (),
        description="Accepted API keys, comma-separated. Unset: no key is asked for.",
        json_schema_extra={"secret": True},
    )
    admin_keys: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (),
        description="Keys for the operator's routes (adapters), comma-separated; they open the others, too. Unset: API "
        "keys do.",
        json_schema_extra={"secret": True},
    )
    allow_unauthenticated: bool = Field(False, description="Allow a non-loopback host without API keys.")
    unknown_params: Literal["strict", "warn"] = Field(
        "strict", description="Unknown request parameters: refuse (400), or ignore and list them in X-Ignored-Params."
    )
    max_body_mib: float = Field(16, gt=0, description="Largest request body in MiB; more is answered 413.")
    engine: Literal["auto", "vllm", "hf", "fake"] = Field(
        "auto",
        description="Backend that computes tokens; auto: vllm where it is installed and there is a GPU, else hf.",
    )
    engine_socket: Path | None = Field(
        None, description="Unix socket of the engine. Unset: run/engine.sock in the home."
    )
    hf_dtype: Literal["auto", "bf16", "fp32", "fp16", "int8", "nf4", "bnb-int8"] = Field(
        "auto",
        description="Weights' type in the hf backend: auto (the checkpoint's), bf16, fp32, fp16, int8 (weights and "
        "activations), nf4 and bnb-int8 (by bitsandbytes).",
    )
    hf_forward: Literal["auto", "generic"] = Field(
        "auto",
        description="Forward pass of the hf backend: auto (our own where the architecture is known), or generic (the "
        "model's own code).",
    )
    hf_kernels: Literal["auto", "off"] = Field(
        "auto",
        description="Our own matrix kernels in the hf backend: auto (compiled by gcc at the first start, where the CPU "
        "has AMX), or off.",
    )
    vllm_dtype: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto", description="Weights' type in the vllm backend; auto is the checkpoint's."
    )
    vllm_quantization: Annotated[
        Literal["awq", "gptq", "compressed-tensors", "fp8", "int8"] | None, BeforeValidator(_refuse_bitsandbytes)
    ] = Field(
        None,
        description="Quantization in the vllm backend: awq, gptq, compressed-tensors (as the checkpoint is), fp8, or "
        "int8 (weights only). Unset: what the checkpoint says.",
    )
    vllm_kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = Field(
        "auto", description="Type of keys and values in the vllm backend; auto is the model's."
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer (vllm backend).")
    vllm_pipeline_parallel_size: int = Field(1, ge=1, description="Groups of GPUs that share out the layers (vllm).")
    vllm_data_parallel_size: int = Field(1, ge=1, description="Copies of the model that share the requests (vllm).")
    vllm_distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        None, description="What starts vLLM's workers: mp (processes of this machine) or ray. Unset: vLLM's choice."
    )
    vllm_gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM may use; on CPUs QLOOP_KV_CACHE_GIB counts."
    )
    vllm_enforce_eager: bool = Field(False, description="No CUDA graphs and no compilation in the vllm backend.")
    vllm_enable_lora: bool = Field(
        True, description="Serve adapters in the vllm backend; without it vLLM keeps no memory for them."
    )
    vllm_args: Annotated[dict[str, Any], BeforeValidator(_parse_object)] = Field(
        {},
        description='More of vLLM\'s engine arguments as a JSON object: `{"block_size": 32}`. Names are checked.',
    )
    prefix_cache: bool = Field(
        True, description="Keep the keys and values of prompts for later ones that begin the same (hf, vllm)."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt + answer in tokens. Unset: the model's own, or what the KV memory holds.",
    )
    kv_cache_gib: float = Field(
        2.0, gt=0, description="Memory for keys and values in GiB (hf; vllm where it runs on CPUs)."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="Most sequences that run at once. Unset: 128, or what vLLM finds right for the device."
    )
    max_adapters: int = Field(
        8, ge=1, description="Most adapters with weights in memory at once; those longest unused make room."
    )
    max_adapter_rank: int | None = Field(
        None,
        ge=1,
        description="Largest rank of an adapter. Unset: any; vllm: the largest published one, 16 without any.",
    )
    adapter_roots: Annotated[tuple[Path, ...], BeforeValidator(_split)] = Field(
        (), description="Folders, comma-separated, from which the API may import adapters by path. Unset: none."
    )
    adapter_wait_s: float = Field(
        30, gt=0, description="Longest a request waits for its adapter to get a place in memory."
    )
    max_queue: int = Field(256, ge=0, description="Most sequences that wait; more are answered 503 with Retry-After.")
    num_threads: int | None = Field(None, ge=1, description="Compute threads of the engine. Unset: all cores.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a model folder.")
    drain_timeout_s: float = Field(600, gt=0, description="Longest a stopping server waits for running answers.")
    heartbeat_timeout_s: float = Field(
        6, ge=1, description="Silence of the engine after which it counts as hung: not ready, then restarted."
    )
    load_timeout_s: float = Field(1800, gt=0, description="Longest an engine may take to load before it is restarted.")
    fake_tokens_per_s: float = Field(0, ge=0, description="Pace of the fake backend per sequence; 0 is unlimited.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")

    @property
    def socket_path(self) -> Path:
        return self.engine_socket or self.home / "run" / "engine.sock"

    @property
    def is_loopback(self) -> bool:
        """Known for certain: a name other than localhost may resolve to anything."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Resolved:
    """Settings, and for each field where its value came from."""

    settings: Settings
    sources: Mapping[str, str]
    warnings: Sequence[str]


def variable(field: str) -> str:
    return PREFIX + field.upper()


def is_secret(field: str) -> bool:
    extra = Settings.model_fields[field].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("secret"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field; values stay strings until `load_settings` validates them with all the others."""
    parser.add_argument("--config", metavar="FILE", help="settings file (.toml, .yaml or .json)")
    for name, info in Settings.model_fields.items():
        text = (info.description or "").replace("%", "%%")
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, metavar="VALUE", help=f"{text} [{variable(name)}]"
        )


def load_settings(arguments: Mapping[str, Any] | None = None, *, dotenv_path: Path = Path(".env")) -> Resolved:
    """Read and merge all layers. Raises ConfigError naming the value, its source and what is accepted."""
    given = {k: v for k, v in (arguments or {}).items() if v is not None}
    dotenv = _read_dotenv(dotenv_path)
    config_path = given.pop("config", None) or os.environ.get(CONFIG_VARIABLE) or dotenv.get(CONFIG_VARIABLE)
    environment, warnings = _environment_layer(os.environ)
    layers = [
        ("command line", given),
        ("environment", environment),
        (str(dotenv_path), _known_variables(dotenv, str(dotenv_path))),
        (str(config_path), _read_config(Path(config_path)) if config_path else {}),
    ]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(Settings.model_fields, "default")
    for source, layer in reversed(layers):
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    return Resolved(_absolute(_validate(values, sources)), sources, warnings)


_inherited: Settings | None = None


def inherit(settings: Settings) -> None:
    """Gunicorn's master says once what all its workers run with, also those it starts later.

    Otherwise a worker that replaces a killed one would read files that an operator is just editing; and a worker that
    fails to boot takes Gunicorn's master, and every stream, with it.
    """
    global _inherited
    _inherited = settings


def worker_settings() -> Settings:
    """The master's settings, or, without Gunicorn, this process's own."""
    return _inherited or load_settings().settings


def environment_for_children(arguments: Mapping[str, Any]) -> dict[str, str]:
    """This process's environment with the command line on top, so that children resolve the same settings."""
    overrides = {variable(k): str(v) for k, v in arguments.items() if v is not None and k in Settings.model_fields}
    if arguments.get("config"):
        overrides[CONFIG_VARIABLE] = str(Path(arguments["config"]).resolve())
    return {**os.environ, **overrides}


def home_path() -> Path:
    """QLOOP_HOME as the server resolves it; the trainer uses the same folder."""
    return load_settings().settings.home


def uses_modelscope() -> bool:
    """vLLM's and the ecosystem's own switch: hub ids are ModelScope's."""
    return os.environ.get(MODELSCOPE_VARIABLE, "").lower() in ("1", "true")


def prepare_multiprocess_metrics(settings: Settings) -> Path:
    """Name prometheus-client's shared folder in the environment; it must be there before that library is imported."""
    folder = os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", str(settings.home / "run" / "metrics"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def prepare_compute_threads() -> None:
    """Let idle compute threads sleep soon; to be called before torch is imported, as OpenMP reads it once.

    By default they spin for long between operations and take the cores from the HTTP workers: on two busy cores a model
    of ten million parameters made 26 tokens per second spinning and 170 sleeping. Sleeping at once costs about 20 us
    for each of some 300 operations of a step. This many rounds, a fraction of a millisecond, have both.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def prepare_vllm(settings: Settings) -> None:
    """What vLLM and its child processes read from the environment; to be called before vllm is imported.

    The operator's own choice wins, except where two processes must agree. No usage report leaves the machine.
    """
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # its counters stay in this process: files cost more than counting
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would copy the socket and this process's threads
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(settings.home / "cache" / "vllm"),
        "VLLM_CONFIG_ROOT": str(settings.home / "cache" / "vllm"),
        "VLLM_LOGGING_LEVEL": "DEBUG" if settings.log_level == "debug" else "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        # On CPUs oneDNN keeps a compiled kernel for every size of a batch that ever was, by default 1,024 of them, half
        # a MiB each: vLLM's worker grew for minutes under changing load. This many hold the sizes of about five steps.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    }
    sizes = (settings.vllm_tensor_parallel_size, settings.vllm_pipeline_parallel_size, settings.vllm_data_parallel_size)
    if sizes == (1, 1, 1):
        cores = sorted(os.sched_getaffinity(0))[: settings.num_threads]
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))  # its own choice leaves a core idle
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def describe(resolved: Resolved) -> str:
    """`--print-config`: each value with its source, secrets masked."""
    rows = []
    for name in Settings.model_fields:
        value = getattr(resolved.settings, name)
        shown = f"({len(value)} hidden)" if is_secret(name) and value else json.dumps(value, default=str)
        rows.append((variable(name), shown, resolved.sources[name]))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _environment_layer(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    ours = {k: v for k, v in environ.items() if k.startswith(PREFIX) and k != CONFIG_VARIABLE}
    known = {variable(field): field for field in Settings.model_fields}
    warnings = [f"{name} is not a setting{_nearest(name, list(known))}" for name in sorted(ours) if name not in known]
    # An empty variable means unset: `QLOOP_MODEL= make serve` must not name a model "".
    return {known[k]: v for k, v in ours.items() if k in known and v != ""}, warnings


def _known_variables(values: Mapping[str, str | None], place: str) -> dict[str, str]:
    layer, warnings = _environment_layer({k: v for k, v in values.items() if v is not None})
    if warnings:
        raise ConfigError(f"{place}: {warnings[0]}.")
    return layer


def _read_dotenv(path: Path) -> dict[str, str | None]:
    return dict(dotenv_values(path)) if path.is_file() else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = _parse_yaml(text) or {}
        else:
            values = json.loads(text)
    except OSError as error:
        raise ConfigError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # json, toml and yaml errors carry line and column
        raise ConfigError(f"The config file {path} does not parse: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} must hold a mapping of settings, such as `port: 8000`.")
    for key in values:
        if key not in Settings.model_fields:
            raise ConfigError(f"{path}: {key!r} is not a setting{_nearest(key, list(Settings.model_fields))}.")
    return {k: v for k, v in values.items() if v is not None}


def _parse_yaml(text: str) -> Any:
    import yaml  # only who uses it pays for it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0])
        shown = "" if is_secret(field) else f"={values.get(field)!r}"
        raise ConfigError(f"{variable(field)}{shown} (from {sources[field]}): {problem['msg']}.") from None


def _absolute(settings: Settings) -> Settings:
    """Make paths absolute, and check what no single field can: processes may run in other folders."""
    settings = settings.model_copy(
        update={
            "home": settings.home.expanduser().resolve(),
            "engine_socket": settings.engine_socket and settings.engine_socket.expanduser().resolve(),
            "adapter_roots": tuple(root.expanduser().resolve() for root in settings.adapter_roots),
        }
    )
    if len(os.fsencode(settings.socket_path)) > UNIX_PATH_BYTES:
        raise ConfigError(
            f"The socket path {settings.socket_path} is longer than the {UNIX_PATH_BYTES} bytes a Unix socket allows: "
            "set QLOOP_ENGINE_SOCKET to a shorter one, such as /tmp/qloop.sock."
        )
    if any(not key.isascii() or not key.isprintable() for key in (*settings.api_keys, *settings.admin_keys)):
        raise ConfigError(
            "QLOOP_API_KEYS and QLOOP_ADMIN_KEYS: keys may hold printable ASCII characters only, as HTTP headers do."
        )
    if not settings.is_loopback and not settings.api_keys and not settings.allow_unauthenticated:
        raise ConfigError(
            f"QLOOP_HOST={settings.host} can be reached from other machines and no API key is set. Set QLOOP_API_KEYS, "
            "listen on 127.0.0.1, or set QLOOP_ALLOW_UNAUTHENTICATED=1 if something in front checks keys."
        )
    return settings
