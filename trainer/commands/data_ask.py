"""`python -m trainer data` label and augment: a model behind an OpenAI-compatible URL works on every row."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.store.home import Home
from trainer.commands.data_options import SubParsers, add_files, add_output, add_tool, count, read, say, writing

if TYPE_CHECKING:
    from trainer.data.ask import Asked, Asker
    from trainer.data.augment import Augmentation
    from trainer.data.label import Labelling
    from trainer.data.rows import Action, LedgerLine, Row

KEY_VARIABLE = "OPENAI_API_KEY"
_KEY_HELP = f"""The key comes from {KEY_VARIABLE}, never from the command line; a server without keys needs none.
Answers are kept beside the output as they come: a stopped command goes on where it was."""


def add(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    """Put the commands below `data`."""
    _add_label(tools, shared)
    _add_augment(tools, shared)


def _add_model(tool: argparse.ArgumentParser, temperature: float, max_tokens: int) -> None:
    tool.add_argument("--url", required=True, help="an OpenAI-compatible API, for example http://127.0.0.1:8000/v1")
    tool.add_argument("--model", required=True, help="the model's name there")
    tool.add_argument("--concurrency", type=count, default=8, help="questions in flight at once [8]")
    tool.add_argument("--tries", type=count, default=3, help="how often an unusable answer is asked for [3]")
    tool.add_argument("--temperature", type=float, default=temperature, help=f"[{temperature:g}]")
    tool.add_argument("--max-tokens", type=count, default=max_tokens, help=f"longest answer in tokens [{max_tokens}]")
    tool.add_argument("--hint", default="", help="more for the model to know, in your words")


def _add_label(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = f"""{_KEY_HELP}

examples:
  python -m trainer data label clean.jsonl --labels 内科,外科,儿科,其他 --url http://127.0.0.1:8000/v1 \\
      --model Qwen2-7B-Instruct --output labelled.jsonl
  python -m trainer data label clean.jsonl --labels-file intents.txt --keep 投诉,退款 --field intent --url ... \\
      --model ... --output complaints.jsonl"""
    tool = add_tool(tools, shared, "label", "let a model give each row a label from a closed list", more)
    add_files(tool)
    add_output(tool)
    _add_model(tool, 0.0, 128)
    tool.add_argument("--labels", default="", metavar="LABEL,...", help="the list")
    tool.add_argument("--labels-file", type=Path, metavar="FILE", help="the list, one label per line")
    tool.add_argument("--keep", default="", metavar="LABEL,...", help="drop rows with any other label")
    tool.add_argument("--field", default="label", help="where the label is written [label]")
    tool.add_argument(
        "--by", choices=["question", "answer", "row"], default="question", help="what is sorted [question]"
    )
    tool.set_defaults(run=_label)


def _label(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.label import Labelling, labels_from
    from trainer.data.rows import Row
    from trainer.data.shapes import CONTENT_KEYS

    labels = labels_from([options.labels], _lines(options.labels_file))
    keep = labels_from([options.keep], ())
    if len(labels) < 2:
        raise ConfigError("--labels or --labels-file: at least two labels are needed to choose from")
    if options.field in CONTENT_KEYS:
        raise ConfigError(f"--field {options.field}: holds the rows' own text; name another field")
    if set(keep) - set(labels):
        raise ConfigError(f"--keep: {', '.join(sorted(set(keep) - set(labels)))} is not among the labels")
    task = Labelling(labels, options.field, options.by, options.hint, keep=keep)
    with _asking(options) as asker, writing(options) as (file, ledger):
        for asked in _answers(options, asker, ledger.take(read(options)), task):
            if asked.refusal:
                ledger.add(_refused(asked, "dropped"))
                continue
            done = task.apply(asked.item, asked.answer)
            file.write(done) if isinstance(done, Row) else ledger.add(done)
    return 0


def _add_augment(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = f"""New rows carry the fields `generated` and `generated_by`.
{_KEY_HELP}

examples:
  python -m trainer data augment rare.jsonl --what questions -n 3 --url http://127.0.0.1:8000/v1 --model ... \\
      --output more.jsonl
  python -m trainer data augment questions.jsonl --what answers --url ... --model ... --output answered.jsonl"""
    tool = add_tool(tools, shared, "augment", "let a model word questions anew, or answer them", more)
    add_files(tool)
    add_output(tool)
    _add_model(tool, 0.8, 2048)
    tool.add_argument("--what", choices=["questions", "answers"], required=True, help="what the model writes")
    tool.add_argument("-n", "--num", type=count, default=1, help="how many for each row [1]")
    tool.add_argument("--only-new", action="store_true", help="leave the rows themselves out of the output")
    tool.set_defaults(run=_augment)


def _augment(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.augment import Augmentation

    if options.stage != "auto":
        raise ConfigError("--stage: augment reads sft rows for questions and takes ppo rows for answers by itself")
    # Questions to be answered are rows that end with the user: what ppo reads.
    options.stage = "sft" if options.what == "questions" else "ppo"
    task = Augmentation(options.what, options.num, options.model, options.hint)
    is_kept = options.what == "questions" and not options.only_new
    with _asking(options) as asker, writing(options) as (file, ledger):
        for asked in _answers(options, asker, ledger.take(read(options)), task):
            if is_kept:
                file.write(asked.item)
            if asked.refusal:
                ledger.add(_refused(asked, "kept" if is_kept else "dropped"))
                continue
            for row in task.new_rows(asked.item, asked.answer):
                file.write(row)
    return 0


def _answers(
    options: argparse.Namespace, asker: "Asker", rows: "Iterator[Row]", task: "Labelling | Augmentation"
) -> "Iterator[Asked[Row]]":
    return asker.ask_all(
        rows, task.prompt, task.check, concurrency=options.concurrency, temperature=options.temperature
    )


def _refused(asked: "Asked[Row]", action: "Action") -> "LedgerLine":
    from trainer.data.rows import LedgerLine

    return LedgerLine(asked.item.source, asked.item.line, action, "no-valid-answer", asked.refusal or "")


@contextmanager
def _asking(options: argparse.Namespace) -> "Iterator[Asker]":
    """Someone to ask. The journal of answers stays as long as there is something to ask again."""
    from trainer.data.ask import Asker, Journal

    if not options.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {options.url}: http://HOST:PORT/v1 or https://HOST/v1 is expected")
    journal = Journal(options.output.with_name(f".{options.output.name}.answers"))
    if len(journal):
        say(f"{len(journal)} answers of an earlier call are used again")
    is_complete = False
    try:
        key = os.environ.get(KEY_VARIABLE)
        asker = Asker(options.url, options.model, key, journal, max_tokens=options.max_tokens, tries=options.tries)
        yield asker
        is_complete = asker.num_refused == 0
        if not is_complete:
            say(f"{asker.num_refused} rows without a usable answer; the same command asks about them again")
    finally:
        journal.close(remove=is_complete)


def _lines(file: Path | None) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels-file {file}: cannot be read ({error})") from None
