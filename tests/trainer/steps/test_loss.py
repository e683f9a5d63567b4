import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import trainer.steps.loss
from trainer.examples.sequences import IGNORED
from trainer.steps.loss import OutputLoss, linear_cross_entropy
from trainer.steps.neftune import EmbeddingNoise

VOCABULARY = 211


def qwen2(tied: bool = True) -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).float()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, VOCABULARY, (3, 40), generator=generator)
    labels = input_ids.clone()
    labels[0, :25] = labels[1, 10:20] = labels[2, -7:] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks and more of the 80 learned places."""
    monkeypatch.setitem(trainer.steps.loss.CHUNK_BYTES, "cpu", 32 * 4 * VOCABULARY)


def stock_loss(model: Any) -> torch.Tensor:
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")


def our_loss(model: Any) -> torch.Tensor:
    inputs = batch()
    output = OutputLoss(model)
    with output.learning(inputs["labels"]):
        loss: torch.Tensor = model(input_ids=inputs["input_ids"]).logits
    output.remove()
    return loss


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 77).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, tolerance: float = 1e-5) -> None:
    ours, stock = our_loss(model), stock_loss(model)
    assert ours.item() == pytest.approx(stock.item(), rel=tolerance)
    found, wanted = gradients(model, ours), gradients(model, stock)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, atol=tolerance * float(grad.abs().max()) + 1e-9, rtol=0), name


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_every_gradient_equal_those_of_full_logits(tied: bool) -> None:
    assert_same(qwen2(tied))


def test_with_lora_on_the_layers_and_with_lora_on_the_head() -> None:
    for targets in (["q_proj", "down_proj"], ["q_proj", "lm_head"]):
        model = get_peft_model(qwen2(tied=False), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        assert_same(model)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "bloom": (BloomForCausalLM, BloomConfig, {}),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": 64}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str) -> None:
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    assert_same(model_class(config_class(**SMALL | options)).float())


def test_under_bf16_autocast_the_loss_stays_exact_to_bf16() -> None:
    model = qwen2()
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = our_loss(model), stock_loss(model)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(stock.item(), rel=2e-3)
    found, wanted = gradients(model, ours), gradients(model, stock)
    for name, grad in wanted.items():
        assert found[name].dtype == torch.float32
        cosine = F.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
        assert cosine > 0.999, name


def test_bf16_weights() -> None:
    ours, stock = our_loss(qwen2().bfloat16()), stock_loss(qwen2())
    assert ours.item() == pytest.approx(stock.item(), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_with_a_bias_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 16), torch.randn(VOCABULARY, 16), torch.randn(VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (50,))
    targets[7] = IGNORED
    ours = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (hidden, weight, bias)]
    linear_cross_entropy(*ours, targets).backward()
    F.cross_entropy(exact[0] @ exact[1].t() + exact[2], targets, reduction="sum").backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for found, wanted in zip(ours, exact, strict=True):
        assert wanted.grad is not None and found.grad is not None and found.grad.dtype == dtype
        assert float((found.grad.double() - wanted.grad).abs().max()) <= tolerance * float(wanted.grad.abs().max())


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    model = qwen2()
    output = OutputLoss(model)
    input_ids = torch.ones((1, 4), dtype=torch.int64)
    with output.learning(torch.full_like(input_ids, IGNORED)):
        loss = model(input_ids=input_ids).logits
    found = gradients(model, loss)
    assert loss.item() == 0.0 and found.keys() == dict(model.named_parameters()).keys()
    assert all(not grad.any() for grad in found.values())


def test_not_a_number_is_not_hidden() -> None:
    model = qwen2()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert math.isnan(our_loss(model).item())


def test_outside_of_learning_the_head_gives_logits() -> None:
    model = qwen2().eval()
    before = model(input_ids=batch()["input_ids"]).logits
    OutputLoss(model)
    assert torch.equal(model(input_ids=batch()["input_ids"]).logits, before)


def test_the_peak_is_chunks_not_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as the logits of all places is ever made."""
    made: list[int] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(
                t.numel() for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, torch.Tensor)
            )
            return out

    hidden, weight = torch.randn(500, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)
    with Spy():
        linear_cross_entropy(hidden, weight, None, torch.zeros(500, dtype=torch.int64)).backward()
    assert max(made) <= 64 * VOCABULARY < 500 * VOCABULARY


def test_noise_depends_on_each_text_s_own_length_and_only_in_training() -> None:
    embedding = torch.nn.Embedding(10, 64)
    noise = EmbeddingNoise(embedding, 5.0)
    ids = torch.zeros((1, 500), dtype=torch.int64)
    lengths = torch.tensor([[4] * 4 + [400] * 400 + [0] * 96])
    plain = copy.deepcopy(embedding.weight[0].detach())
    assert torch.equal(embedding(ids)[0, 0], plain)
    with noise.for_lengths(lengths):
        difference = (embedding(ids)[0] - plain).abs().detach()
        assert float(difference[:4].max()) == pytest.approx(5 / math.sqrt(4 * 64), rel=0.05)
        assert float(difference[4:404].max()) == pytest.approx(5 / math.sqrt(400 * 64), rel=0.05)
        embedding.eval()
        assert torch.equal(embedding(ids)[0, 0], plain)
