"""train_classifier.py, whose model is cut afterwards: tested with 6, 5, 4 and 3 layers, for instance.

The layers that stay are chosen as `cmp-trainer shrink --data` chooses them, by the loss on the validation rows, and in
a second test the top ones go. A model that is left without a layer computes what the written smaller model computes.
A model that had fewer layers from the start is tested as it is where more layers would be allowed.
"""

from typing import Any

from train_classifier import main

from cmp_trainer.execution.ablated import without_layers
from cmp_trainer.execution.layers import find_stack
from cmp_trainer.shrink import bottom_layers, choose_layers

FEWEST, MOST = 3, 6


def tested_with_fewer_layers(trainer: Any, test: Any) -> dict[str, float]:
    """Test loss and accuracy with at most FEWEST to MOST layers, the best ones or the bottom ones."""

    def validated(model: Any) -> dict[str, float]:
        return {"loss": trainer.evaluate(metric_key_prefix="x")["x_loss"]}

    model = trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    stack = find_stack(model, lambda: model(**batch))
    chosen = {
        "best": choose_layers(model, stack, FEWEST, validated),
        "bottom": bottom_layers(len(stack.layers)),
    }
    whole = trainer.evaluate(test, metric_key_prefix="x")
    found: dict[str, float] = {}
    for name, layers_of in chosen.items():
        for number in range(FEWEST, MOST + 1):
            if number >= len(stack.layers):
                measured = whole
            else:
                with without_layers(stack, {*range(len(stack.layers))} - {*layers_of[number]}):
                    measured = trainer.evaluate(test, metric_key_prefix="x")
            for key in ("loss", "accuracy"):
                found[f"test-{name}-{number}_{key}"] = measured[f"x_{key}"]
    return found


if __name__ == "__main__":
    main(measure=tested_with_fewer_layers)
