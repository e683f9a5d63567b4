"""`compare`: did it get better? Base against tuned against others, as a report that anyone can read."""

import argparse
import sys
from pathlib import Path

from server.store.home import Home
from trainer.commands.data_options import count
from trainer.commands.evaluate import add_settings, candidate_options, settings_of

EPILOG = """\
Tasks are those of `eval`. What is given by --domain is what the model was trained for, by --general what it must not
have forgotten: `publish --report DIR` decides by them.

examples:
  python -m trainer compare qwen2-demo my-run --domain likelihood=held_out.jsonl --task identity=Xiaozhi
  python -m trainer compare Qwen/Qwen2-7B-Instruct my-adapter --domain mmcu/ --general ceval/val --language zh
  python -m trainer compare qwen2-demo http://127.0.0.1:8000/v1#my-adapter --task text=answers.jsonl
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "compare",
        parents=[shared],
        help="base against tuned: table, intervals, answers side by side",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="what the others are compared with")
    parser.add_argument("candidates", nargs="+", metavar="TUNED", help="models, runs, adapters or URLs")
    parser.add_argument("--domain", action="append", default=[], metavar="KIND=PATH", help="what it was trained for")
    parser.add_argument("--general", action="append", default=[], metavar="KIND=PATH", help="must not be forgotten")
    parser.add_argument("--task", action="append", default=[], metavar="KIND=PATH", help="anything else")
    add_settings(parser)
    parser.add_argument("--answers", type=count, default=5, metavar="N", help="losses, gains and others shown [5]")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the report [en]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the report's folder [reports/… in the home]")
    parser.add_argument("--again", action="store_true", help="ask anew what is finished already")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace, home: Home) -> int:
    from trainer.compare.comparison import REPORT_HTML
    from trainer.compare.run import Request, compare
    from trainer.compare.story import headline, sentences
    from trainer.compare.words import Words
    from trainer.evaluate.open_candidate import check_options

    names, asked = [options.base, *options.candidates], candidate_options(options)
    check_options(names, asked)
    request = Request(
        candidates=names,
        domain=options.domain,
        general=options.general,
        others=options.task,
        settings=settings_of(options),
        options=asked,
        num_answers=options.answers,
    )
    comparison, folder = compare(
        request,
        home,
        output=options.output,
        language=options.language,
        again=options.again,
        say=lambda text: print(text, file=sys.stderr),
    )
    words = Words(options.language)
    for place in range(1, len(comparison.candidates)):
        print(headline(comparison, place, words))
        for line in sentences(comparison, place, words):
            print(f"  {line}")
    print(folder / REPORT_HTML)
    return 0
