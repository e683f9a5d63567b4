"""torch.distributed.run without its tracebacks: the ranks say themselves what went wrong, see `trainer.launch`."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """Start the ranks named by the command line and wait; 1 if one failed. Names those that could not say why."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            # The others are stopped with SIGTERM when the first one fails.
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                print(f"error: process {rank} of the run was ended by {name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
