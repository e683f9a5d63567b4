"""Rules of thumb that users have read, beside our figures: what they say for this model, and where they come from."""

from trainer.estimate.shape import ModelShape

GB = 10**9
# Memory of ChatGLM-6B in GB, as its fine-tuning course prints it: format, inference, parameter-efficient tuning.
SIX_BILLION = (("FP16", 13, 14), ("INT8", 8, 9), ("INT4", 6, 7))


def rule_lines(shape: ModelShape) -> list[str]:
    """For N billion parameters; 1 GB is 10^9 bytes here, as in the rules."""
    billions = shape.num_parameters / GB
    six = "; ".join(f"{name} {infer} / {tune} GB" for name, infer, tune in SIX_BILLION)
    return [
        f"2N rule: 16-bit weights alone, at least {2 * billions:.1f} GB (LoRA on a 7B in fp16 is often given as 13 GB)",
        f"4N rule: 32-bit weights alone, at least {4 * billions:.1f} GB",
        f"N rule: int8 weights to serve, at least {billions:.1f} GB (7B: about 6.5 GB)",
        f"16N rule: full training in mixed precision with Adam (ZeRO paper, K=12): {16 * billions:.1f} GB "
        "and activations",
        f"a 6B's table (inference / adapter tuning): {six}",
        "LLM Poor's 7B in int8 with 200 + 1000 tokens: about 9 GB (KV cache 1.2, model 7, other 0.7)",
    ]
