"""Log lines of every process: time, level, process, logger, text. Prompts, answers and keys never go in."""

import logging
import os
import sys

FORMAT = "%(asctime)s %(levelname)-7s [%(process)d] %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Once per process, to stderr. Libraries speak only from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("qloop").setLevel(level.upper())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one short text at a time: threads only cost memory
