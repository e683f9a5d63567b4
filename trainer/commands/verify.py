"""`verify`: could the engine serve what a configuration would make; does it serve what a run has made?"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.store.home import Home
from trainer.commands.data_options import count
from trainer.commands.evaluate import KEY_VARIABLES
from trainer.commands.train import resolve_words

if TYPE_CHECKING:
    from trainer.verify.target import Server, Target

SUFFIXES = (".json", ".yaml", ".yml", ".sh")
NUM_PROMPTS, NUM_TOKENS = 32, 64


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    verify = commands.add_parser(
        "verify",
        parents=[shared],
        help="before training: could it be served? After it: is it served as it was trained?",
        description="Of a configuration: whether the engine could serve what it would make. Of a run or an adapter: "
        "whether transformers with PEFT, the merged weights and the engine write the same tokens. Exit code 8 with the "
        "first reason why not.",
    )
    verify.add_argument(
        "subject", metavar="CFG|RUN|ADAPTER", help="a configuration, a run, an adapter's folder or name"
    )
    verify.add_argument("words", nargs="*", metavar="key=value", help="options on top of a configuration")
    engine = verify.add_argument_group("the engine")
    engine.add_argument("--engine", choices=("hf", "vllm"), help="its kind [the server's, else hf]")
    engine.add_argument("--max-rank", type=count, metavar="N", help="the largest rank that it takes [the server's]")
    engine.add_argument("--server", metavar="URL", help="a running server of ours; its key comes from OPENAI_API_KEY")
    after = verify.add_argument_group("of a run or an adapter")
    after.add_argument("--base", help="base model, if the adapter does not name it")
    after.add_argument("--prompts", type=count, metavar="N", help=f"so many prompts [{NUM_PROMPTS}]")
    after.add_argument("--tokens", type=count, metavar="N", help=f"so many tokens of each answer [{NUM_TOKENS}]")
    after.add_argument("--output", type=Path, metavar="FILE", help="the result as JSON [verify.json of the run]")
    after.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace, home: Home) -> int:
    is_plan = Path(options.subject).suffix in SUFFIXES or "=" in options.subject
    _check(options, is_plan)
    from trainer.verify.target import Server, Target

    server = Server(options.server, _key()) if options.server else None
    target = server.target() if server else Target(engine=options.engine or "hf", max_rank=options.max_rank)
    if server and options.engine and options.engine != target.engine:
        raise ConfigError(f"--engine {options.engine}: {server.url} runs the {target.engine} engine; leave it out")
    if is_plan:
        return _before([options.subject, *options.words], home, target)
    return _after(options, home, target, server)


def _check(options: argparse.Namespace, is_plan: bool) -> None:
    """Nothing is accepted and ignored. Raises ConfigError."""
    after = ("base", "prompts", "tokens", "output", "trust_remote_code")
    if is_plan and (given := [name for name in after if getattr(options, name)]):
        raise ConfigError(f"--{given[0].replace('_', '-')}: is for a run or an adapter, and nothing is trained yet")
    if not is_plan and options.words:
        raise ConfigError(f"{options.words[0]}: options go with a configuration, and {options.subject} is none")
    if options.server and options.max_rank:
        raise ConfigError("--max-rank: the server says itself which ranks it takes; leave it out")


def _before(words: list[str], home: Home, target: "Target") -> int:
    from trainer.errors import NotServable
    from trainer.verify.findings import table
    from trainer.verify.plan import check_plan

    findings = check_plan(resolve_words(words).config, home, target)
    print(table(findings))
    faults = [one for one in findings if one.state == "fault"]
    if faults:
        raise NotServable(f"{faults[0].check}: {faults[0]}")
    return 0


def _after(options: argparse.Namespace, home: Home, target: "Target", server: "Server | None") -> int:
    from server.store.hashes import write_json
    from trainer.results.adapter_folder import find_adapter, named_adapter
    from trainer.verify.findings import table
    from trainer.verify.proof import Job, default_prompts, prove

    folder, base = named_adapter(options.subject, home)
    job = Job(
        found=find_adapter(folder, home, options.base or base),
        home=home,
        target=target,
        server=server,
        prompts=default_prompts(options.prompts or NUM_PROMPTS),
        num_tokens=options.tokens or NUM_TOKENS,
        trust=options.trust_remote_code,
    )
    proof = prove(job, lambda text: print(text, file=sys.stderr))
    print(table(proof.findings))
    output = options.output or (folder / "verify.json" if (folder / "run.json").is_file() else None)
    if output:
        write_json(output, asdict(proof))
        print(f"written to {output}")
    proof.check()
    return 0


def _key() -> str:
    """The operator's, where the server has keys."""
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
