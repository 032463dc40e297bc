"""Captures a comparative step in a CUDA graph and replays it; prints as JSON the error, or the task losses.

python capture_step.py EXECUTION [NUMBER OF ABLATED LAYERS]
"""

import json
import os
import sys
from typing import Any

import torch

from cmp_trainer import CmpDrop, ComparativeLoss, ComparativeStep
from tests.cuda.steps import EXECUTIONS, batch, bert

SEEDS = (5, 6)


def replayed(execution: str, layers: int | None) -> dict[str, Any]:
    """Task losses of eager steps and of replays by seed, and of a replay that goes on from the last."""
    model, inputs, seen = bert(attn_implementation="eager"), batch(), []
    del inputs["attention_mask"]  # to see whether it masks anything, transformers waits for the GPU

    def objective(losses: torch.Tensor) -> torch.Tensor:
        seen.append(losses.detach())
        return ComparativeLoss()(losses)

    step = ComparativeStep(model, [CmpDrop()] * 2, objective, ablated_layers=layers, **EXECUTIONS[execution])

    def run() -> torch.Tensor:
        model.zero_grad()
        step(inputs).backward()
        return seen[-1]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    found: dict[str, Any] = {"eager": [], "replayed": []}
    for seed in SEEDS:
        torch.manual_seed(seed)
        found["eager"].append(run().tolist())
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = run()
    for seed in SEEDS:
        torch.manual_seed(seed)
        graph.replay()
        found["replayed"].append(losses.tolist())
    graph.replay()
    found["next"] = losses.tolist()
    return found


if __name__ == "__main__":
    try:
        result = replayed(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
    except (RuntimeError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)
    os._exit(0)  # what a failed capture left behind cannot always be taken down
