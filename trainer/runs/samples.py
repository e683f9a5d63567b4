"""Answers of the model in training to fixed questions, over time: samples.jsonl.

Greedy and short, and training does not notice: modes, random state and caches are as before. Knows no template: it is
given prompts as token ids.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.errors import Stopped
from trainer.runs.run_folder import RunFolder

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class SamplePrompt:
    """A question as the config has it, and as the model reads it."""

    text: str
    token_ids: Sequence[int]


class SampleAnswers(TrainerCallback):
    """Answers before the first step, at each evaluation (without any: at each checkpoint), and at the end."""

    def __init__(
        self,
        run: RunFolder,
        prompts: Sequence[SamplePrompt],
        decode: Callable[[list[int]], str],
        *,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        self._run = run
        self._prompts = prompts
        self._decode = decode
        self._settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad_id,
        )
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step == 0:
            self._answer(model, state)
        self._last_step = state.global_step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._answer(model, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if args.eval_strategy == "no":
            self._answer(model, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._answer(model, state)

    def _answer(self, model: Any, state: TrainerState) -> None:
        if state.global_step == self._last_step or not self._prompts:
            return
        self._last_step = state.global_step
        try:
            with undisturbed(model):
                answers = [self._generate(model, prompt) for prompt in self._prompts]
        except Stopped:
            raise
        except Exception as error:  # a sample is worth less than the run
            self._prompts = ()
            self._run.append_event("samples failed", step=state.global_step, error=f"{type(error).__name__}: {error}")
            return
        for prompt, answer in zip(self._prompts, answers, strict=True):
            self._run.append_sample({"step": state.global_step, "prompt": prompt.text, "answer": answer})

    def _generate(self, model: Any, prompt: SamplePrompt) -> str:
        ids = torch.tensor([list(prompt.token_ids)], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self._settings)
        return self._decode(output[0, ids.shape[1] :].tolist())


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    _keep_4bit_trainable(model)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    try:
        # inference_mode would leave tensors behind that autograd refuses.
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _keep_4bit_trainable(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight in place when it infers; training then fails."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
