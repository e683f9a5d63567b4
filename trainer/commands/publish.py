"""`publish`, and moving a name between revisions that are published: `promote`, `rollback`."""

import argparse
import math
import sys
from pathlib import Path

from server.errors import ConfigError
from server.store.home import Home
from trainer.gate import MARGIN, RULES, GateRules, parse_rules

NO_REASON = "no reason given"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    publish = commands.add_parser(
        "publish",
        parents=[shared],
        help="put an adapter into the registry; its name moves to it if it is proved better",
        description="The revision enters the registry either way. The name moves to it only if the gate passes: the "
        "domain's score is up with its whole interval above 0, general ability is not down by more than the margin, "
        "identity and safety pass. Without --report and --domain, the reference answers of the run's own held-out rows "
        "are the domain. Exit code 7 when the gate refuses.",
    )
    publish.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's id or folder, an adapter's folder or name")
    publish.add_argument("--name", required=True, help="the adapter's name in the API")
    publish.add_argument("--base", help="base model, if the adapter does not name it")
    publish.add_argument("--report", type=Path, metavar="DIR", help="a folder that `compare` wrote about this adapter")
    for role, text in (
        ("domain", "what it was trained for: must be better"),
        ("general", "what it must not have forgotten"),
        ("task", "further tasks, identity and safety for instance"),
    ):
        publish.add_argument(f"--{role}", action="append", default=[], metavar="KIND=PATH", help=text)
    publish.add_argument(
        "--require", default="", metavar="RULES", help=f"refuse without evidence for these: {', '.join(RULES)} [domain]"
    )
    publish.add_argument(
        "--margin", type=_points, default=MARGIN, metavar="POINTS", help=f"general ability may lose this [{MARGIN:g}]"
    )
    publish.add_argument("--output", type=Path, metavar="DIR", help="where what is measured here is reported")
    publish.add_argument("--language", choices=("en", "zh"), help="of that report [en]")
    _add_force(publish)
    publish.set_defaults(run=_publish)

    promote = commands.add_parser("promote", parents=[shared], help="point a name at one of its revisions")
    promote.add_argument("name", help="the adapter's name in the API")
    promote.add_argument("revision", help="12 hexadecimal digits")
    _add_force(promote)
    promote.set_defaults(run=_promote)

    rollback = commands.add_parser("rollback", parents=[shared], help="point a name back at what it meant before")
    rollback.add_argument("name", help="the adapter's name in the API")
    rollback.set_defaults(run=_rollback)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="move the name whatever the gate says; the card tells it")
    parser.add_argument("--reason", metavar="WHY", help="with --force: why, for the card")


def _publish(options: argparse.Namespace, home: Home) -> int:
    rules = GateRules(margin=options.margin, required=parse_rules(options.require.replace(",", " ").split()))
    force = _force(options)
    measuring = ("domain", "general", "task", "output", "language")
    if options.report and (given := [f"--{name}" for name in measuring if getattr(options, name)]):
        raise ConfigError(f"{given[0]}: --report holds what was measured already; give one of the two")
    from trainer.evidence import find_evidence
    from trainer.publish import publish_proved
    from trainer.results.adapter_folder import named_adapter

    folder, named_base = named_adapter(options.source, home)
    base = options.base or named_base
    evidence, note = find_evidence(options, folder, base, home)
    if note:
        print(note, file=sys.stderr)
    done = publish_proved(folder, options.name, home, rules, evidence, base=base, force=force)
    print(f"published {done.entry.id} in {done.entry.path}" + (", forced" if done.is_forced else ""))
    for result in done.gate.results:
        print(f"  {result}")
    return 0


def _promote(options: argparse.Namespace, home: Home) -> int:
    from trainer.publish import promote

    print(f"{options.name} is {promote(options.name, options.revision, home, force=_force(options)).id}")
    return 0


def _rollback(options: argparse.Namespace, home: Home) -> int:
    from trainer.publish import rollback

    print(f"{options.name} is {rollback(options.name, home).id}")
    return 0


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number of points from 0 up is expected")
    return points


def _force(options: argparse.Namespace) -> str | None:
    if options.reason and not options.force:
        raise ConfigError("--reason: goes with --force; without it the gate decides")
    return (options.reason or NO_REASON) if options.force else None
