"""FSDP2 on two CPU ranks: the loss that lives in the output layer's own forward meets sharded weights.

transformers shards on GPUs only, so torch's `fully_shard` is applied by hand, as accelerate does it there: to every
layer, then to the model.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.services import ROOT, clean_environment
from trainer.methods.base_model import load_base
from trainer.steps.loss import OutputLoss

NUM_STEPS, RATE = 3, 0.1


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Four examples of eight tokens, [4, 8], and their labels; ranks learn different numbers of tokens."""
    tokens = torch.arange(32).view(4, 8) * 7 % 300 + 1
    labels = tokens.clone()
    for row, unlearned in enumerate((1, 3, 6, 5)):
        labels[row, :unlearned] = -100
    return tokens, labels


def train_steps(model: torch.nn.Module, loss: OutputLoss, part: slice, share: float) -> None:
    """Plain gradient descent on the mean over all learned tokens; `share`: what averaging over ranks divides by."""
    tokens, labels = rows()
    count = int((labels[:, 1:] != -100).sum())
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(NUM_STEPS):
        with loss.learning(labels[part]):
            (model(input_ids=tokens[part], use_cache=False).logits * share / count).backward()
        optimizer.step()
        optimizer.zero_grad()


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.trainer.steps.test_fsdp import train_steps
from trainer.methods.base_model import load_base
from trainer.steps.loss import OutputLoss

base, target = map(Path, json.loads(sys.argv[1]))
distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = load_base(base, dtype=torch.float32).train()
loss = OutputLoss(model)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
rank = distributed.get_rank()
train_steps(model, loss, slice(2 * rank, 2 * rank + 2), share=2.0)
assert all(type(weight).__name__ == "DTensor" for weight in model.parameters())
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    save_file({name: weight.clone().contiguous() for name, weight in state.items()}, target)
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_with_fsdp2_give_the_weights_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    alone = load_base(tiny_model, dtype=torch.float32).train()
    before = {name: weight.clone() for name, weight in alone.state_dict().items()}
    train_steps(alone, OutputLoss(alone), slice(None), share=1.0)
    script, target = tmp_path / "script.py", tmp_path / "two.safetensors"
    script.write_text(SCRIPT)
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command = [sys.executable, "-m", *launch, "--rdzv-endpoint", "localhost:0", str(script)]
    done = subprocess.run(
        [*command, json.dumps([str(tiny_model), str(target)])],
        cwd=ROOT,
        env=clean_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(target)
    wanted = alone.state_dict()
    assert max(float((wanted[name] - before[name]).abs().max()) for name in wanted) > 1e-3
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, atol=1e-5, rtol=0), name
