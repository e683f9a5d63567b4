"""`python -m server`: the whole service in one command, and the small commands around it."""

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import server
from server.errors import ConfigError, QloopError
from server.ops.logging import configure_logging
from server.ops.supervisor import Supervisor
from server.settings import Resolved, Settings, add_arguments, describe, environment_for_children, load_settings

EXIT_CONFIG = 78  # sysexits.h EX_CONFIG
HANDSHAKE_TIMEOUT_S = 5.0


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    command: Callable[[Resolved, dict[str, Any]], int] = arguments.run
    values = {k: v for k, v in vars(arguments).items() if k not in ("run", "command", "print_config")}
    try:
        resolved = load_settings(values)
        if getattr(arguments, "print_config", False):
            print(describe(resolved))
            return 0
        return command(resolved, values)
    except (ConfigError, QloopError) as error:
        print(f"qloop: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _parser() -> argparse.ArgumentParser:
    text = "Serve a model, and its adapters, as OpenAI's API."
    parser = argparse.ArgumentParser(prog="python -m server", description=text, argument_default=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"qloop {server.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, run, text in (
        ("serve", serve, "start everything and watch over it (the default)"),
        ("reload", reload, "new code and settings in the HTTP workers; the engine keeps its weights"),
        ("preflight", preflight, "try code, settings and the running engine without serving"),
    ):
        sub = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        _add_options(sub)
    _add_options(parser)
    parser.set_defaults(run=serve)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    text = "show every setting and its source, then exit"
    parser.add_argument("--print-config", action="store_true", default=argparse.SUPPRESS, help=text)
    add_arguments(parser)


def serve(resolved: Resolved, arguments: dict[str, Any]) -> int:
    settings = resolved.settings
    configure_logging(settings.log_level)
    for warning in resolved.warnings:
        print(f"qloop: warning: {warning}", file=sys.stderr)
    with _only_supervisor(settings):
        _check_port(settings)
        return asyncio.run(_supervise(settings, environment_for_children(arguments)))


async def _supervise(settings: Settings, environment: dict[str, str]) -> int:
    return await Supervisor(settings, environment).run()


def reload(resolved: Resolved, arguments: dict[str, Any]) -> int:
    """Preflight here, where the operator reads the reason, then HUP; the supervisor tries again by itself."""
    pid = _supervisor_pid(resolved.settings)
    if pid is None:
        raise ConfigError(f"No supervisor runs in {resolved.settings.home}. Start it with 'python -m server'.")
    if (status := preflight(resolved, arguments)) != 0:
        return status
    os.kill(pid, signal.SIGHUP)
    print(f"reload sent to the supervisor, pid {pid}")
    return 0


def preflight(resolved: Resolved, arguments: dict[str, Any]) -> int:
    """Exit 0 when new workers would serve: the app imports, settings are valid, the engine speaks our protocol."""
    from server.app import create_app

    create_app(resolved.settings)
    return asyncio.run(_handshake(resolved.settings))


async def _handshake(settings: Settings) -> int:
    from server.engine.client import EngineClient

    client = EngineClient(settings.socket_path)
    client.start()
    try:
        await client.wait_ready(HANDSHAKE_TIMEOUT_S)
    finally:
        await client.close()
    print("preflight passed")
    return 0


# --- one supervisor per home ---


def _pid_path(settings: Settings) -> Path:
    return settings.home / "run" / "supervisor.pid"


@contextlib.contextmanager
def _only_supervisor(settings: Settings) -> Iterator[None]:
    """Hold the pid file's lock. Raises ConfigError when another supervisor does."""
    path = _pid_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"qloop already runs in {settings.home} (pid {path.read_text().strip()}). "
                "Stop it first, or set another QLOOP_HOME and QLOOP_PORT."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _supervisor_pid(settings: Settings) -> int | None:
    """The pid of whoever holds the lock; a left-over file of a dead supervisor counts as none."""
    path = _pid_path(settings)
    if not path.is_file():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read())
    return None


def _check_port(settings: Settings) -> None:
    """A taken port is the most common start-up error: say it before a model is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    deadline = time.monotonic() + 2.0
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, settings.port))
                return
            except OSError as error:
                if time.monotonic() > deadline:  # a predecessor may still be leaving
                    raise ConfigError(
                        f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
                        "Stop what uses it, or set QLOOP_PORT."
                    ) from None
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
