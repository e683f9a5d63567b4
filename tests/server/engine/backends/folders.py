"""Tiny model and adapter folders that tests build for themselves, and the reference answers of stock libraries."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)  # for models this small, more threads only get in each other's way

VOCAB_SIZE = 264  # 256 bytes, 3 control tokens, padding rows as Qwen2 has them
ENDOFTEXT, IM_START, IM_END = 256, 257, 258
MAX_POSITIONS = 512
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random Qwen2 whose greedy text wanders: untied head, layers scaled up (a plain one repeats its last token)."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "eos_token_id": ENDOFTEXT,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **overrides}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(5)
            if name == "lm_head.weight":
                weight.mul_(10)  # peaked enough that two tokens seldom tie
    model.to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=[IM_END, ENDOFTEXT], pad_token_id=ENDOFTEXT)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Token ids 0-255 are bytes in the byte-level alphabet's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_reference(folder: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(folder: Path, model_folder: Path, *, seed: int = 1, scale: float = 0.3, **options: Any) -> Path:
    """A LoRA adapter with random, clearly visible weights, saved by PEFT itself."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(load_reference(model_folder), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def greedy_with_gaps(
    model_folder: Path, prompt: list[int], num_tokens: int, adapter: Path | None = None
) -> tuple[list[int], list[float]]:
    """Stock `generate`'s greedy ids, and at each the distance in nats between the two most likely ids."""
    model: Any = load_reference(model_folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    result = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=[VOCAB_SIZE],  # never: run to the full length
        return_dict_in_generate=True,
        output_logits=True,
    )
    tops = torch.stack([logits[0].float().log_softmax(-1).topk(2).values for logits in result.logits])
    return result.sequences[0, len(prompt) :].tolist(), (tops[:, 0] - tops[:, 1]).tolist()


def assert_agrees(got: list[int], reference: tuple[list[int], list[float]], min_gap: float = 1e-3) -> None:
    """The same token wherever the reference's top-2 gap is clear; after an unclear one the texts may part."""
    expected, gaps = reference
    assert len(got) == len(expected)
    for position, (mine, theirs, gap) in enumerate(zip(got, expected, gaps, strict=True)):
        if mine != theirs:
            assert gap <= min_gap, f"token {position}: {mine} instead of {theirs}, gap {gap:.4f} nat"
            return
