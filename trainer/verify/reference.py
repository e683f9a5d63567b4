"""What stock transformers and PEFT write with the adapter, and what the merged weights choose at each place."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from server.text.render import ChatRenderer
from trainer.methods.base_model import saved_dtype
from trainer.results.adapter_folder import FoundAdapter
from trainer.results.merge import PROMPT_TYPES, merged_model, with_adapter
from trainer.verify.parity import NONE, Agreement, Reference, compare_choices


def references(model: Any, renderer: ChatRenderer, prompts: Sequence[str], num_tokens: int) -> list[Reference]:
    """Greedy answers of exactly `num_tokens`, over any stop token: a served answer is a beginning of it."""
    return [_reference(model, renderer, prompt, num_tokens) for prompt in prompts]


def load_adapted(found: FoundAdapter, *, trust: bool = False) -> Any:
    """The base in float32 with the adapter on it. Raises ConfigError and NotServable."""
    return with_adapter(found, trust)


def can_merge(found: FoundAdapter) -> bool:
    return str(found.config["peft_type"]).upper() not in PROMPT_TYPES


def merged_agreement(model: Any, found: FoundAdapter, expected: Sequence[Reference]) -> tuple[Agreement, str]:
    """Of weights merged in float32, then cast to the base's dtype, in which they compute; and that dtype's name.

    `model` is used up.
    """
    dtype = saved_dtype(found.base)
    merged = merged_model(model, found).to(dtype)
    total = NONE
    for reference in expected:
        # A cast moves every weight, so no gap is clear: the share of equal tokens is what counts.
        total += compare_choices(reference, _choices(merged, reference), float("inf"))
    return total, str(dtype).removeprefix("torch.")


def _reference(model: Any, renderer: ChatRenderer, prompt: str, num_tokens: int) -> Reference:
    ids = prompt_ids(renderer, prompt)
    with warnings.catch_warnings(), torch.no_grad():
        # transformers' generate sends position ids; PEFT drops them and says so.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        result = model.generate(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=model.config.vocab_size,  # never
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tops = torch.stack([logits[0].float().log_softmax(-1).topk(2).values for logits in result.logits])
    gaps = (tops[:, 0] - tops[:, 1]).tolist()
    return Reference(prompt, ids, result.sequences[0, -num_tokens:].tolist(), gaps)


def prompt_ids(renderer: ChatRenderer, prompt: str) -> list[int]:
    """The prompt as a chat, or as it is for a base without a template."""
    if renderer.template is None:
        return renderer.tokenizer.encode_plain(prompt)
    return renderer.render([{"role": "user", "content": prompt}])


@torch.no_grad()
def _choices(model: Any, reference: Reference) -> list[int]:
    """The most likely token at each place of the reference's answer."""
    ids = torch.tensor([[*reference.prompt_ids, *reference.token_ids[:-1]]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    chosen: list[int] = logits[len(reference.prompt_ids) - 1 :].float().argmax(-1).tolist()
    return chosen
