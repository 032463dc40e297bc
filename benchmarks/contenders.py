"""What a step of comparative loss is measured against: each contender is a function from a batch to a loss.

R-Drop and the published scheme are written here as they are described by their authors (R-Drop:
https://arxiv.org/abs/2106.14448; the scheme: https://doi.org/10.1145/3652599), for comparison only.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.losses.comparative import comparative_loss

Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]


def plain(model: Any) -> Step:
    """A step of Trainer."""
    trainer: Any = Trainer(model, TrainingArguments(**_quiet()))
    return lambda batch: trainer.compute_loss(model, {k: v for k, v in batch.items() if k != "crop_segments"})


def comparative(model: Any, **cmp_arguments: Any) -> Step:
    """A step of CmpTrainer; with cmp_low_memory parts of the backward happen inside."""
    trainer = comparative_trainer(model, **cmp_arguments)
    return lambda batch: trainer.compute_loss(model, dict(batch))


def comparative_trainer(model: Any, **cmp_arguments: Any) -> Any:
    """A trainer whose compute_loss can be called outside of a training."""
    trainer = CmpTrainer(model, CmpTrainingArguments(**_quiet(), **cmp_arguments))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def r_drop(model: Any, weight: float = 1.0) -> Step:
    """Two dropout forwards as one doubled batch, and the symmetric KL divergence of their predictions."""

    def step(batch: Batch) -> Tensor:
        inputs = {name: torch.cat([value, value]) for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        task = F.cross_entropy(logits, torch.cat([batch["labels"]] * 2))
        one, two = logits.log_softmax(-1).chunk(2)
        divergence = F.kl_div(one, two, log_target=True, reduction="batchmean")
        return task + weight * (divergence + F.kl_div(two, one, log_target=True, reduction="batchmean")) / 2

    return step


def published_scheme(model: Any, num_ablations: int) -> Step:
    """Walk over the dropout modules to set their rates, restore the random state, forward; once for each variant."""

    def step(batch: Batch) -> Tensor:
        dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
        state, losses = torch.get_rng_state(), []
        for drops in range(num_ablations + 1):
            torch.set_rng_state(state)
            for module, rate in dropouts:
                module.p = 1 - (1 - rate) ** drops
            losses.append(F.cross_entropy(model(**batch).logits, batch["labels"], reduction="none"))
        for module, rate in dropouts:
            module.p = rate
        return comparative_loss(torch.stack(losses, 1)).mean()

    return step


def _quiet() -> dict[str, Any]:
    return {"output_dir": tempfile.mkdtemp(), "report_to": [], "use_cpu": True, "disable_tqdm": True}
