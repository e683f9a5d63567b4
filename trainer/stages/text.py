"""pt and sft: rows -> labelled tokens -> packed or padded steps -> the trained model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback

from server.errors import ConfigError
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.config import TrainConfig
from trainer.data.rows import LedgerLine, Row
from trainer.examples.base_facts import pad_id
from trainer.examples.dataset import TrainingData, load_data
from trainer.examples.labels import ChatLabels, TextLabels, label, labels_of
from trainer.examples.sequences import Example, ExampleSet
from trainer.options.arguments import training_arguments
from trainer.ranks import rank
from trainer.runs.callbacks import run_callbacks
from trainer.runs.samples import SampleAnswers, SamplePrompt
from trainer.stages.evaluation import train_watched
from trainer.steps.batches import Layout
from trainer.steps.loop import ExactTrainer, Units
from trainer.steps.probe import can_pack

if TYPE_CHECKING:
    from trainer.train import Job


def train_text(job: "Job") -> Any:
    """Raises DataError before the model is loaded, and whatever training raises."""
    renderer = ChatRenderer.load(job.base)
    examples = ExampleSet()
    data = _load(job, renderer, examples)
    lengths = examples.lengths
    job.check_memory([lengths[index] for index in data.train])
    model = job.load_model()
    packs = _packs(job, model)
    num_processes = int(job.session.identity["num_processes"])
    trainer = ExactTrainer(
        model,
        training_arguments(job.config, job.run.path, validates=bool(data.validation)),
        _units(job.config, examples, data.train, packs),
        _layout(job.config, num_processes, packs),
        pad_id=pad_id(job.base),
        validation=_units(job.config, examples, data.validation, packs) if data.validation else None,
        neftune_alpha=job.config.neftune_noise_alpha,
        callbacks=callbacks(job, renderer),
    )
    train_watched(job, trainer)
    return trainer


def callbacks(job: "Job", renderer: ChatRenderer) -> list[Any]:
    """What watches the loop of any stage."""
    config = job.config
    found: list[Any] = run_callbacks(
        job.session,
        title=job.title,
        save_total_limit=config.save_total_limit,
        bar=not config.disable_tqdm,
        report_to=config.report_to,
    )
    if config.early_stopping_patience:
        found.append(EarlyStoppingCallback(config.early_stopping_patience))
    prompts = _sample_prompts(config, renderer)
    if prompts:
        stop_ids = [token for token in (renderer.turn_end_id, renderer.tokenizer.eos_token_id) if token is not None]
        decode = renderer.tokenizer.decode
        found.append(SampleAnswers(job.run, prompts, decode, stop_ids=stop_ids, pad_id=pad_id(job.base)))
    return found


def _load(job: "Job", renderer: ChatRenderer, examples: ExampleSet) -> TrainingData[int]:
    config = job.config
    labels = labels_of(config, job.base, renderer)
    with job.ledger() as ledger:
        data = load_data(config, _stored(labels, examples), ledger)
    job.say(ledger.summary())
    job.run.record(
        num_examples=len(data.train),
        num_validation_examples=len(data.validation),
        num_replayed=data.num_replayed,
        num_rejected=ledger.rows["dropped"],
        num_trained_tokens=examples.num_trained_tokens(data.train),
    )
    return data


def _stored(labels: ChatLabels | TextLabels, examples: ExampleSet) -> Callable[[Row], Iterator[int | LedgerLine]]:
    def store(row: Row) -> Iterator[int | LedgerLine]:
        for item in label(row, labels):
            yield examples.append(item) if isinstance(item, Example) else item

    return store


def _packs(job: "Job", model: Any) -> bool:
    """Packing as the config asks, or wherever the model keeps packed rows apart. Raises ConfigError if it cannot."""
    if job.config.packing is False or not can_pack(model):
        if job.config.packing:
            kind = f"a {model.config.model_type} model with finetuning_type={job.config.finetuning_type}"
            raise ConfigError(f"packing=true: {kind} does not keep packed rows apart; leave packing unset")
        return False
    return True


def _units(config: TrainConfig, examples: ExampleSet, indices: list[int], packs: bool) -> Units:
    """A pre-training batch counts blocks of full length, a fine-tuning batch conversations."""
    if config.stage == "pt" and packs:
        longest = max(config.max_length, *(len(examples[index].token_ids) for index in indices[:1]))
        return Units.blocks(examples, indices, longest)
    return Units.single(examples, indices)


def _layout(config: TrainConfig, num_processes: int, packs: bool) -> Layout:
    size = config.per_device_train_batch_size
    most = size * config.max_length if packs else None
    return Layout(size, config.gradient_accumulation_steps, num_processes, rank(), most)


def _sample_prompts(config: TrainConfig, renderer: ChatRenderer) -> list[SamplePrompt]:
    """Pre-training goes on from a text, which needs no template; else it is a question."""
    texts = [line for entry in config.sample_prompts for line in _questions(entry)]
    try:
        if config.stage == "pt":
            return [SamplePrompt(text, renderer.tokenizer.encode_plain(text)) for text in texts]
        return [SamplePrompt(text, renderer.render([{"role": "user", "content": text}])) for text in texts]
    except (TemplateError, TextError) as error:
        raise ConfigError(f"sample_prompts: {error}") from None


def _questions(entry: str) -> list[str]:
    if not entry.endswith(".txt"):
        return [entry]
    lines = Path(entry).expanduser().read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]
