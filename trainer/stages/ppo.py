"""ppo: the model answers prompts, a reward model scores the answers, and the model moves a little towards better ones.

Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) on tokens, with a value head on the model's last
hidden state, generalized advantages (arXiv:1506.02438), and a price on drifting from the base. One optimizer step of
the loop is the last of `epochs` updates on one batch of answers. Small by intent: one process.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from server.errors import ConfigError
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.data.rows import LedgerLine, Row, RowRefused
from trainer.examples.base_facts import limits_of, pad_id
from trainer.examples.dataset import load_data
from trainer.examples.labels import with_tools
from trainer.methods.base_model import load_base
from trainer.options.arguments import loading, training_arguments
from trainer.options.checks import WHOLE_METHODS
from trainer.runs.callbacks import run_training
from trainer.stages.answers import Answers, gae, whitened
from trainer.stages.reward import load_reward
from trainer.stages.text import callbacks
from trainer.steps.divergence import Place, StrictTrainer

if TYPE_CHECKING:
    from trainer.train import Job

Score = Callable[[list[list[int]]], Tensor]  # whole conversations as token ids -> one reward each


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    source: str
    line: int


@dataclass(frozen=True)
class PpoSettings:
    """`kl_price` per nat of drift from the base; `pass_size`: rows of one forward pass."""

    max_new_tokens: int
    stop_id: int
    pad_id: int
    pass_size: int = 16
    epochs: int = 4
    kl_price: float = 0.1
    clip: float = 0.2
    value_weight: float = 0.1
    gae_lambda: float = 0.95


class PpoTrainer(StrictTrainer):
    """Each batch is a list of prompts. `reference` makes the model its own base while it is entered."""

    def __init__(
        self, model: Any, *, settings: PpoSettings, score: Score, reference: Callable[[], Any], **kwargs: Any
    ) -> None:
        weight = model.get_output_embeddings().weight
        model.value_head = nn.Linear(weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(model.value_head.weight)
        nn.init.zeros_(model.value_head.bias)
        self._settings = settings
        self._score = score
        self._reference = reference
        self._seen: dict[str, list[float]] = {}
        super().__init__(model=model, data_collator=self._left_padded, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The last update's loss; the earlier updates on the same answers are applied here."""
        answers = self._answer(model, inputs["input_ids"], inputs["attention_mask"])
        rows = self._step_rows
        for _ in range(self._settings.epochs - 1):
            self.accelerator.backward(self._update(model, answers))
            self._get_grad_norm(model, self._clip_grad_norm(model))  # type: ignore[no-untyped-call]
            self.optimizer.step()  # type: ignore[union-attr]
            model.zero_grad()
            self._step_rows = rows
        return self._update(model, answers)

    def _update(self, model: Any, answers: Answers) -> Tensor:
        """The loss of all answers. Their gradients are made, but for the last pass, whose are the caller's to make."""
        *before, last = answers.parts(self._settings.pass_size)
        count = answers.mask.sum().clamp(min=1)
        done = torch.zeros((), device=count.device)
        for part in before:
            loss = self._loss(model, part, count)
            self.accelerator.backward(loss)
            done += loss.detach()
        return done + self._loss(model, last, count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {name: sum(found) / len(found) for name, found in self._seen.items()}, start_time)
        self._seen = {}

    def _left_padded(self, members: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(member["token_ids"]) for member in members)
        tokens = torch.full((len(members), width), self._settings.pad_id)
        attention = torch.zeros_like(tokens)
        for row, member in enumerate(members):
            tokens[row, width - len(member["token_ids"]) :] = torch.tensor(member["token_ids"])
            attention[row, width - len(member["token_ids"]) :] = 1
        return {
            "input_ids": tokens,
            "attention_mask": attention,
            "rows": torch.tensor([member["row"] for member in members]),
        }

    @torch.no_grad()
    def _answer(self, model: Any, prompts: Tensor, attention: Tensor) -> Answers:
        settings, policy = self._settings, self.accelerator.unwrap_model(model)
        policy.eval()
        tokens = policy.generate(
            input_ids=prompts,
            attention_mask=attention,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=settings.stop_id,
            pad_token_id=settings.pad_id,
            use_cache=True,
        )
        new = tokens[:, prompts.shape[1] :]
        # The stop token counts, what comes after it does not.
        mask = (new == settings.stop_id).cumsum(1) - (new == settings.stop_id).long() == 0
        attention = torch.cat([attention, mask.long()], dim=1)
        log_p, values = self._in_passes(policy, tokens, attention, new.shape[1])
        with self._reference() as base:
            base_log_p, _ = self._in_passes(base or policy, tokens, attention, new.shape[1])
        policy.train()
        drift = (log_p - base_log_p) * mask
        scores = self._score([row[seen.bool()].tolist() for row, seen in zip(tokens, attention, strict=True)])
        rewards = -settings.kl_price * drift
        last = mask.sum(1) - 1
        rewards[torch.arange(len(rewards)), last] += scores.to(rewards)
        advantages = gae(rewards, values * mask, mask, settings.gae_lambda)
        self._note(reward=scores.mean(), drift=drift.sum(1).mean(), answer_tokens=mask.sum(1).float().mean())
        return Answers(tokens, attention, mask, log_p, values, whitened(advantages, mask), advantages + values)

    def _in_passes(self, model: Any, tokens: Tensor, attention: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
        size = self._settings.pass_size
        parts = zip(torch.split(tokens, size), torch.split(attention, size), strict=True)
        found = [self._log_p_and_values(model, *part, num_new) for part in parts]
        return torch.cat([log_p for log_p, _ in found]), torch.cat([values for _, values in found])

    def _log_p_and_values(self, model: Any, tokens: Tensor, attention: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
        """Log probabilities and values [rows, num_new] of the last tokens, float32."""
        hidden: list[Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        try:
            logits = model(input_ids=tokens, attention_mask=attention, position_ids=positions, use_cache=False).logits
        finally:
            hook.remove()
        log_p = torch.log_softmax(logits[:, -num_new - 1 : -1].float(), dim=-1)
        chosen = log_p.gather(2, tokens[:, -num_new:, None]).squeeze(2)
        head = getattr(model, "value_head", None)
        values = head(hidden[0][:, -num_new - 1 : -1].float()).squeeze(2) if head else torch.zeros_like(chosen)
        return chosen, values

    def _loss(self, model: Any, answers: Answers, count: Tensor) -> Tensor:
        """The answers' share of the mean over `count` tokens."""
        settings, mask = self._settings, answers.mask
        log_p, values = self._log_p_and_values(model, answers.tokens, answers.attention, mask.shape[1])
        ratio = torch.exp((log_p - answers.log_p) * mask)
        bounded = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        gain = torch.minimum(ratio * answers.advantages, bounded * answers.advantages)
        near = answers.values + (values - answers.values).clamp(-settings.clip, settings.clip)
        error = torch.maximum((values - answers.returns) ** 2, (near - answers.returns) ** 2)
        return ((-gain + settings.value_weight * 0.5 * error) * mask).sum() / count

    def _note(self, **found: Tensor) -> None:
        for name, value in found.items():
            self._seen.setdefault(name, []).append(float(value))


def train_ppo(job: "Job") -> Any:
    """Raises DataError before any model is loaded, ConfigError for the reward model, and whatever training raises."""
    config = job.config
    if job.session.identity["num_processes"] > 1:
        raise ConfigError("stage=ppo trains in one process: set num_processes=1")
    renderer = ChatRenderer.load(job.base)
    most = limits_of(config, job.base).max_length - config.ppo_max_new_tokens
    with job.ledger() as ledger:
        data = load_data(config, lambda row: _prompts(row, renderer, most), ledger)
    job.say(ledger.summary())
    job.run.record(num_examples=len(data.train), num_rejected=ledger.rows["dropped"])
    job.check_memory([len(prompt.token_ids) + config.ppo_max_new_tokens for prompt in data.train])
    score = load_reward(config, job.home)
    model = job.load_model()
    trainer = PpoTrainer(
        model,
        settings=_settings(job, renderer),
        score=score,
        reference=_reference(job, model),
        # A batch of answers is that of an optimizer step, or the updates before the last would have none of their own.
        args=training_arguments(
            config,
            job.run.path,
            validates=False,
            save_strategy="no",
            per_device_train_batch_size=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            gradient_accumulation_steps=1,
        ),
        train_dataset=[{"token_ids": prompt.token_ids, "row": row} for row, prompt in enumerate(data.train)],
        callbacks=callbacks(job, renderer),
    )
    places: list[Place] = [(prompt.source, prompt.line) for prompt in data.train]
    trainer.places = places
    run_training(trainer, job.session)
    del trainer.accelerator.unwrap_model(trainer.model).value_head  # the result is a language model
    return trainer


def _settings(job: "Job", renderer: ChatRenderer) -> PpoSettings:
    pad = pad_id(job.base)
    return PpoSettings(
        job.config.ppo_max_new_tokens,
        pad if renderer.turn_end_id is None else renderer.turn_end_id,
        pad,
        pass_size=job.config.per_device_train_batch_size,
        epochs=job.config.ppo_epochs,
        kl_price=job.config.ppo_kl,
    )


def _reference(job: "Job", model: Any) -> Callable[[], AbstractContextManager[Any]]:
    """An adapter's reference is the base below it; whole weights need a second copy."""
    if job.config.finetuning_type in WHOLE_METHODS:
        base = load_base(job.base, **loading(job.config)).to(model.device).eval()
        return lambda: nullcontext(base)
    return lambda: model.disable_adapter()


def _prompts(row: Row, renderer: ChatRenderer, most: int) -> Iterator[Prompt | LedgerLine]:
    try:
        told = with_tools(row, renderer)
        token_ids = renderer.render(told.row.messages, tools=told.tools)
    except RowRefused as error:
        yield LedgerLine(row.source, row.line, "dropped", error.code, error.detail)
        return
    except (TextError, TemplateError) as error:
        yield LedgerLine(row.source, row.line, "dropped", "bad-text", str(error))
        return
    if len(token_ids) > most:
        yield LedgerLine(row.source, row.line, "dropped", "too-long", f"{len(token_ids)} tokens, {most} are left")
        return
    yield from told.notes
    yield Prompt(token_ids, row.source, row.line)
