"""Where ppo's reward model lies: the run that trained it, or a folder. Reads run.json only; knows no torch."""

from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import resolve_model
from trainer.config import TrainConfig
from trainer.runs.run_folder import RECORD, read_run


@dataclass(frozen=True)
class RewardSource:
    """`folder`: the one that was named; `model`: of the weights, with their head unless there is an `adapter`."""

    folder: Path
    model: Path
    adapter: Path | None = None


def find_reward(config: TrainConfig, home: Home) -> RewardSource:
    """Raises ConfigError when `reward_model` is neither a finished rm run nor a folder."""
    if not config.reward_model:
        raise ConfigError("reward_model is not set: stage=ppo needs the run or folder of a model trained with stage=rm")
    found = [
        path for path in (Path(config.reward_model).expanduser(), home.runs / config.reward_model) if path.is_dir()
    ]
    if not found:
        raise ConfigError(f"reward_model={config.reward_model}: no such run or folder")
    folder = found[0]
    if not (folder / RECORD).is_file():
        return RewardSource(folder, folder)
    record = read_run(folder)
    if record.get("state") != "done" or record.get("config", {}).get("stage") != "rm":
        raise ConfigError(f"reward_model={config.reward_model}: this is no finished run of stage=rm")
    if record.get("output") == "model":
        return RewardSource(folder, folder / "model")
    return RewardSource(folder, resolve_model(str(record["base_path"]), home), folder / "adapter")
