"""`eval`: questions of benchmark files asked of a model, a run, an adapter or a URL, and what the answers are worth."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from server.store.home import Home
from trainer.commands.data_ask import KEY_VARIABLE
from trainer.commands.data_options import count

KEY_VARIABLES = (KEY_VARIABLE,)
DESCRIPTION = """\
Ask the questions of benchmark files, and score the answers. What is asked is a running engine: the same code, template
and tokens that will serve. Nothing is lost when it is stopped: the same command goes on where it was.

tasks:
  PATH                 a file or folder of questions; what they are is told from it
  choice=PATH          multiple choice: MMLU, C-Eval, CMMLU, MMCU, Gaokao, AGIEval, CPsyExam, option texts
  text=PATH            written answers beside references: BLEU-1 to 4, ROUGE-L
  bbh=PATH             BIG-Bench Hard: short answers compared as they are
  sql=PATH             text2sql: the query's result in the SQLite database beside the questions
  likelihood=PATH      held-out training rows: log-likelihood and perplexity of their answers
  identity=NAME        says it is NAME on every way to ask; NAME/AUTHOR where the author may be named
  safety               prompts about self-harm: must answer, and point to help
"""
EPILOG = """\
A URL's key comes from OPENAI_API_KEY, never from the command line.

examples:
  python -m trainer eval qwen2-demo --task mmlu/ --shots 5
  python -m trainer eval my-run --task likelihood=held_out.jsonl --task identity=Xiaozhi --task safety
  python -m trainer eval http://127.0.0.1:8000/v1#qwen2-demo --task choice=ceval/val --by answer
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "eval",
        parents=[shared],
        help="score a model, run, adapter or URL on benchmark files",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "candidate", metavar="NAME_OR_URL", help="a model, run or adapter, or http://host:port/v1#model"
    )
    parser.add_argument("--task", dest="tasks", action="append", required=True, metavar="KIND=PATH", help="see above")
    add_settings(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the result's folder [evals/ID in the home]")
    parser.add_argument("--again", action="store_true", help="ask anew what is finished already")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_eval)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that `compare` has, too."""
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="solved examples before each question [0]")
    parser.add_argument(
        "--by",
        choices=("logprob", "answer"),
        default="logprob",
        help="choice: by the letters' probabilities, or by the written answer [logprob]",
    )
    parser.add_argument("--shuffle", action="store_true", help="choice: options in an order drawn by the seed")
    parser.add_argument("--limit", type=count, metavar="N", help="at most so many questions of each task")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--plain", dest="style", action="store_const", const="plain", help="plain text, for base models")
    style.add_argument(
        "--chat", dest="style", action="store_const", const="chat", help="the chat template [where there is one]"
    )
    parser.set_defaults(style="auto")
    parser.add_argument("--system", default="", help="system prompt of every question")
    parser.add_argument("--max-tokens", type=count, default=256, metavar="N", help="longest written answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; up to 2 [0]")
    parser.add_argument("--seed", type=int, default=0, help="of shuffling, sampling and intervals [0]")
    parser.add_argument("--engine", choices=("auto", "hf", "vllm", "fake"), default="auto", help="backend [auto]")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto", help="weights [auto]")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="URL: a folder with the model's tokenizer")
    parser.add_argument("--concurrency", type=count, default=16, metavar="N", help="URL: requests at a time [16]")


def settings_of(options: argparse.Namespace) -> Any:
    from trainer.evaluate.settings import EvalSettings

    return EvalSettings(
        shots=options.shots,
        by=options.by,
        style=options.style,
        shuffle=options.shuffle,
        limit=options.limit,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        system=options.system,
        seed=options.seed,
    )


def candidate_options(options: argparse.Namespace) -> Any:
    from trainer.evaluate.open_candidate import CandidateOptions

    return CandidateOptions(
        engine=options.engine,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        concurrency=options.concurrency,
        api_key=next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None),
    )


def _eval(options: argparse.Namespace, home: Home) -> int:
    from trainer.evaluate.open_candidate import check_options, is_url
    from trainer.evaluate.session import evaluate_name
    from trainer.evaluate.table import table
    from trainer.evaluate.tasks.make import make_tasks

    settings, asked = settings_of(options), candidate_options(options)
    check_options([options.candidate], asked)
    tasks = make_tasks(options.tasks, settings)
    for task in tasks:
        refused = "".join(f", {number} x {code}" for code, number in task.refused.items())
        print(f"{task.name}: {task.num_read} items, {len(task.items)} to score{refused}", file=sys.stderr)
    if not is_url(options.candidate):
        print("starting the engine", file=sys.stderr)
    done = evaluate_name(
        options.candidate,
        tasks,
        home,
        settings,
        asked,
        output=options.output,
        again=options.again,
        shows_progress=not options.quiet,
    )
    if done.was_finished:
        print(f"evaluated already on {done.result.date}; --again asks anew", file=sys.stderr)
    print("\n".join(table(done.result)))
    print(f"\n{done.folder}")
    return 0
