"""A loop of one's own with accelerate and ComparativeStep; launched in two processes, or called in one.

accelerate launch --num_processes=2 step_in_accelerate.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForSequenceClassification

from cmp_trainer import CmpDrop, ComparativeStep
from tests.helpers import tiny_bert, token_data

ROWS, BATCH = 24, 4
SETTINGS = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "layers at random": {"layerdrop": 0.5},
    "low memory": {"low_memory": True},
}


def bart(layerdrop: float) -> torch.nn.Module:
    """A small encoder-decoder that leaves out layers at random in training."""
    torch.manual_seed(0)
    settings = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    settings |= dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 16)
    layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_layerdrop": layerdrop, "decoder_layerdrop": layerdrop}
    tokens = {"vocab_size": 40, "pad_token_id": 1, "eos_token_id": 4, "bos_token_id": 2, "decoder_start_token_id": 4}
    return BartForSequenceClassification(BartConfig(**settings, **layers, **tokens, num_labels=3))


def train(
    accumulate: int, mixed_precision: str = "no", layerdrop: float | None = None, low_memory: bool = False
) -> dict[str, torch.Tensor]:
    """Weights after three optimizer steps of two batches each, accumulated or one in each process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        mixed_precision=mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=layerdrop is not None)],
    )
    model = tiny_bert() if layerdrop is None else bart(layerdrop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = token_data(ROWS)
    if layerdrop is not None:  # the head reads the last token that ends a text
        ids = [[*row[:-1], 4] for row in data["input_ids"]]
        data = data.remove_columns("input_ids").add_column("input_ids", ids)
    loader = DataLoader(data.with_format("torch"), batch_size=BATCH, shuffle=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = ComparativeStep(model, [CmpDrop(), CmpDrop()], forward="sequential", low_memory=low_memory)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            torch.manual_seed(5)  # the masks of a batch depend on nothing else
            accelerator.backward(step(batch))
            optimizer.step()
            optimizer.zero_grad()
    logs = step.log(lambda sums: accelerator.reduce(sums, "sum"))
    weights = {name: value.detach().clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    return {**weights, "log": torch.tensor(list(logs.values()))}


if __name__ == "__main__":
    found = {name: train(1, **settings) for name, settings in SETTINGS.items()}
    torch.save(found, Path(sys.argv[1], f"rank_{torch.distributed.get_rank()}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
