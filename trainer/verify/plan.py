"""Before training: could the engine serve what this configuration would make? Nothing is loaded, nothing is trained."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.store.hashes import weights_hash
from server.store.home import Home
from server.store.model_folder import check_model_folder, read_model_config, resolve_model
from server.store.servability import HF_ONLY, VLLM_DEFAULT_RANK, largest_rank, servable
from server.text.identity import text_identity
from trainer.config import TrainConfig
from trainer.methods.plan import base_bits, changes_base, planned_config
from trainer.options.checks import WHOLE_METHODS
from trainer.verify.findings import Finding, fault, note, ok
from trainer.verify.target import Target

MERGE = "merge it into its base afterwards (`merge`), and serve the merged model"


def check_plan(config: TrainConfig, home: Home, target: Target) -> list[Finding]:
    """Raises ConfigError where there is no such base."""
    base = resolve_model(config.model_name_or_path, home, with_weights=bool(target.weights_hash))
    model_config = read_model_config(base)
    findings = list(plan_findings(config, model_config, target))
    if target.weights_hash:
        findings += _base_findings(base, home, target)
    return findings


def plan_findings(config: TrainConfig, model_config: Mapping[str, Any], target: Target) -> Iterator[Finding]:
    """By the options and the base's config.json alone."""
    method = config.finetuning_type
    if config.stage == "rm":
        yield fault("stage", "stage=rm makes a reward model, which writes no text and is served by no engine")
        return
    if method in WHOLE_METHODS:
        yield note(
            "method", f"finetuning_type={method} makes a whole model, served by QLOOP_MODEL and not as an adapter"
        )
        yield from _quantized_base(model_config, target)
        return
    planned = planned_config(config)
    # Of rank 1: what the rank itself allows is a finding of its own.
    verdict = servable({**planned, "r": 1, "rank_pattern": None}, str(model_config.get("model_type")))
    if target.engine in verdict.backends:
        yield ok("method", f"the {target.engine} engine serves {_named(planned, method)}")
    else:
        yield fault("method", f"the {target.engine} engine does not serve {_named(planned, method)}", _cure(planned))
    yield from _rank(config, planned, target)
    yield from _quantized_base(model_config, target)
    if base_bits(config) and not model_config.get("quantization_config"):
        yield note(
            "base",
            f"trained on a {base_bits(config)}-bit copy, and served on the base itself in 16 bits, whose weights "
            "differ by that rounding",
        )


def _named(planned: Mapping[str, Any], method: str) -> str:
    """The method, with the option that decides."""
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication"):
        if planned.get(option):
            return f"{option}={planned[option]!r}"
    if planned.get("bias", "none") != "none":
        return f"bias={planned['bias']!r}"
    return f"finetuning_type={method}" if method != "peft" else f"{planned.get('peft_type')} adapters"


def _cure(planned: Mapping[str, Any]) -> str:
    if str(planned.get("peft_type")).upper() in HF_ONLY:
        return "take finetuning_type=lora, or serve it with QLOOP_ENGINE=hf"
    if planned.get("use_dora"):
        return f"leave out use_dora, or {MERGE}"
    if planned.get("modules_to_save"):
        return f"leave out modules_to_save: it names whole layers, which cannot be swapped per request; or {MERGE}"
    if planned.get("trainable_token_indices"):
        return f"use tokens that the base has instead of new ones; or {MERGE}"
    return f"take finetuning_type=lora, or {MERGE}"


def _rank(config: TrainConfig, planned: Mapping[str, Any], target: Target) -> Iterator[Finding]:
    rank = largest_rank(planned)
    if not rank:
        return
    doubled = ", because lora_init=" + config.lora_init + " is saved as a plain LoRA of twice the rank"
    why = doubled if changes_base(config) else ""
    most = target.most_rank
    if most is not None and rank > most:
        largest = most // 2 if changes_base(config) else most
        yield fault(
            "rank",
            f"rank {rank}{why}, the engine takes at most {most}",
            f"set lora_rank={largest}{', or ' if target.limit_for(rank) else ''}{target.limit_for(rank)}",
        )
    elif target.engine == "vllm" and target.max_rank is None and rank > VLLM_DEFAULT_RANK:
        yield note("rank", f"rank {rank}{why}: {target.limit_for(rank)}")
    else:
        yield ok("rank", f"rank {rank}{why}")


def _quantized_base(model_config: Mapping[str, Any], target: Target) -> Iterator[Finding]:
    quantized = model_config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    if method == "bitsandbytes" and target.engine == "vllm":
        yield fault(
            "base",
            "the base is quantized with bitsandbytes, which vLLM does not read",
            "train on the 16-bit base with quantization_bit=4, or serve it with QLOOP_ENGINE=hf",
        )


def _base_findings(base: Path, home: Home, target: Target) -> Iterator[Finding]:
    """Whether the server runs this very base."""
    check_model_folder(base)
    own = weights_hash(base, cache_path=home.hash_cache)
    if own != target.weights_hash:
        yield fault(
            "base",
            f"{base} has weights {own[:12]}, {target.url} serves {target.model} with {target.weights_hash[:12]}",
            "train on the model that is served, or serve the one that is trained on",
        )
        return
    text = text_identity(base)
    for what, trained, served in (
        ("tokenizer", text.tokenizer_hash, target.tokenizer_hash),
        ("chat template", text.chat_template_hash, target.chat_template_hash),
        ("default system prompt", text.default_system_prompt_hash or "", target.default_system_prompt_hash),
    ):
        if trained != served:
            yield fault(what, f"{base} and {target.url} have different ones", f"copy the {what} of one to the other")
        else:
            yield ok(what, "the same")
