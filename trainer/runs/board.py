"""TensorBoard on request: the Trainer's numbers in the run's `tensorboard` folder."""

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import TensorBoardCallback

from server.errors import ConfigError
from trainer.runs.run_folder import RunFolder

NAME = "tensorboard"


def check_board(report_to: Sequence[str]) -> None:
    """Raises ConfigError when TensorBoard is asked for and not installed."""
    if NAME in report_to and find_spec(NAME) is None:
        raise ConfigError("report_to=tensorboard: the package is not installed; pip install 'qloop[tensorboard]'")


def board_callback(run: RunFolder, step: int) -> TensorBoardCallback:
    """Writes from `step` on; what an earlier attempt has shown of later steps disappears."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.path / NAME), purge_step=step + 1)
    return TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
