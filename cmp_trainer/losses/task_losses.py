"""Per-example task losses: what a Trainer step averages away, kept apart.

The Trainer's loss is a mean over a batch; comparative loss compares the losses of one example. This file computes
them from a model's outputs and labels, by what the outputs are:

| outputs | labels | task | parts |
| --- | --- | --- | --- |
| logits (batch, classes) | integers (batch,) | classification, multiple choice, image and audio classification | 1 |
| logits (batch, classes) | floats (batch, classes) | multi-label classification | 1 |
| logits (batch, 1 or targets) | numbers, `num_labels=1` or problem type regression | regression | 1 |
| logits (batch, length, classes) | integers (batch, length) | token classification, masked, causal, seq2seq LM | 1 |
| start_logits and end_logits (batch, length) | positions (batch,) | extractive question answering | 2 |

Each loss comes with a weight, the number of labels it is a mean of, so that the weighted mean over the examples is
the Trainer's own batch loss. Source of the formulas: `transformers.loss.loss_utils`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100
LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


class TaskLosses(NamedTuple):
    """Task losses of one variant, `(batch, parts)` each.

    `values`: the mean loss over the labels of that part of the example, 0 where there is none. `weights`: how many
    labels that are, 0 where there is none.
    """

    values: Tensor
    weights: Tensor


class UnknownTask(ValueError):
    """The outputs and labels fit none of the tasks whose per-example losses are known."""


PerExampleLoss = Callable[[Any, Mapping[str, Any]], Tensor | TaskLosses]


def task_losses(
    outputs: Any,
    inputs: Mapping[str, Any],
    *,
    problem_type: str | None = None,
    shifts_labels: bool = False,
    label_smoothing: float = 0.0,
) -> TaskLosses:
    """Per-example losses of a model's outputs.

    Args:
        outputs: what the model returned, a mapping with `logits` (or `start_logits` and `end_logits`) or a tuple.
        inputs: the batch, with `labels` (or `start_positions` and `end_positions`).
        problem_type: the model configuration's; when None it follows from the labels as in transformers.
        shifts_labels: position i predicts label i + 1 (causal language models).
        label_smoothing: epsilon of the Trainer's label smoothing, for losses that are a cross entropy.

    Raises:
        UnknownTask: outputs and labels fit no known task.
        ValueError: labels outside the range of classes or of the wrong type or shape.
    """
    if "start_positions" in inputs and isinstance(outputs, Mapping) and "start_logits" in outputs:
        starts = _position_losses(outputs["start_logits"], inputs["start_positions"])
        ends = _position_losses(outputs["end_logits"], inputs["end_positions"])
        return TaskLosses(torch.stack([starts.values, ends.values], 1), torch.stack([starts.weights, ends.weights], 1))
    logits = _logits(outputs)
    labels = inputs.get("labels")
    if logits is not None and labels is None:
        raise UnknownTask(_no_labels(inputs))
    if logits is None or not isinstance(labels, Tensor):
        raise UnknownTask(_unknown(outputs, inputs))
    if logits.ndim == 3 and labels.ndim == 2 and logits.shape[:2] == labels.shape:
        if shifts_labels:
            labels = inputs["shift_labels"] if "shift_labels" in inputs else _shifted(labels)
        return _as_part(_token_losses(logits, labels, label_smoothing))
    if logits.ndim == 2 or (logits.ndim == 1 and labels.shape == logits.shape):
        return _as_part(_example_losses(logits, labels, problem_type, label_smoothing))
    raise UnknownTask(_unknown(outputs, inputs))


def user_losses(function: PerExampleLoss, outputs: Any, inputs: Mapping[str, Any]) -> TaskLosses:
    """Per-example losses from the user's own function, checked and brought to `(batch, parts)`.

    Raises:
        ValueError: the function returned something else than `(batch,)` or `(batch, parts)` floats.
    """
    losses = function(outputs, inputs)
    if isinstance(losses, TaskLosses):
        return losses
    sizes = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim}
    if not isinstance(losses, Tensor) or losses.ndim not in (1, 2) or not losses.is_floating_point():
        given = (
            f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        )
        raise ValueError(
            f"per_example_loss_func returned {given}; expected a float tensor of shape (batch,) or (batch, parts) "
            'that is not averaged over the batch, e.g. cross_entropy(…, reduction="none").'
        )
    if len(sizes) == 1 and 1 not in sizes and len(losses) not in sizes:  # a packed batch is one row of many examples
        raise ValueError(
            f"per_example_loss_func returned {len(losses)} rows for a batch of {sizes.pop()} examples; expected one "
            "row each. Losses of tokens have to be averaged over the tokens of their example first."
        )
    values = losses.unsqueeze(1) if losses.ndim == 1 else losses
    return TaskLosses(values, torch.ones_like(values))


def batch_mean(values: Tensor, weights: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The Trainer's normalization: the weighted mean over the examples, then the mean over the parts.

    Args:
        values: `(batch, parts)` losses.
        weights: `(batch, parts)` numbers of labels.
        num_items: the number of labels in all batches of the optimizer step, when the Trainer counted it.

    Returns:
        A scalar; 0, with a gradient of 0, when nothing is labelled.
    """
    total = (values * weights).sum(0)
    count = weights.sum(0) if num_items is None else torch.as_tensor(num_items, device=values.device)
    return (total / count.masked_fill(count == 0, 1)).mean()


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of the model's logits predicts label i + 1: causal language models, no encoder-decoders."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    by_loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    names = {kind.__name__ for kind in type(model).__mro__}  # FSDP trains a subclass of the model's class
    return by_loss or not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def without_labels(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without labels, so that the model does not compute a batch loss that nobody uses.

    Encoder-decoder models make the decoder's input from the labels; it is made here. A model that cannot say how
    keeps its labels.
    """
    kept = {name: value for name, value in inputs.items() if name not in LABEL_NAMES}
    needs_decoder_input = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if not needs_decoder_input or "decoder_input_ids" in inputs or "labels" not in inputs:
        return kept
    if inputs["labels"].ndim != 2 or inputs["labels"].is_floating_point():
        return kept
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return dict(inputs)
    return {**kept, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}


def _example_losses(logits: Tensor, labels: Tensor, problem_type: str | None, label_smoothing: float) -> TaskLosses:
    """One label, or one row of labels, an example: (batch, classes) -> (batch,)."""
    num_classes = 1 if logits.ndim == 1 else logits.shape[1]
    if problem_type is None:
        if num_classes == 1:
            problem_type = "regression"
        else:
            problem_type = (
                "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            )
    if problem_type == "single_label_classification":
        if labels.is_floating_point() or labels.numel() != len(logits):
            raise ValueError(_wrong_labels(labels, f"integers of shape ({len(logits)},)", num_classes))
        losses = _cross_entropy(logits, labels.view(-1), label_smoothing)
        return TaskLosses(losses, (labels.view(-1) != IGNORED).to(losses.dtype))
    if label_smoothing:
        task = problem_type.replace("_", "-")
        raise ValueError(f"--label_smoothing_factor {label_smoothing} needs class labels; this is {task}.")
    if labels.numel() != logits.numel():
        raise ValueError(_wrong_labels(labels, f"floats of shape {tuple(logits.shape)}", num_classes))
    if problem_type == "multi_label_classification" and not labels.is_floating_point():
        raise ValueError(_wrong_labels(labels, f"floats of shape {tuple(logits.shape)}", num_classes))
    labels = labels.view_as(logits).to(logits.dtype)
    if problem_type == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    losses = losses.view(len(logits), -1).mean(1)
    return TaskLosses(losses, torch.full_like(losses, num_classes))


def _token_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> TaskLosses:
    """Mean over the labelled tokens of each example: (batch, length, classes) -> (batch,)."""
    # float() as in transformers; flattened views, so that nothing larger than the logits is made.
    losses = _cross_entropy(logits.float().flatten(0, 1), labels.reshape(-1), label_smoothing).view(labels.shape)
    weights = (labels != IGNORED).sum(1).to(losses.dtype)
    return TaskLosses(losses.sum(1) / weights.clamp(min=1), weights)


def _position_losses(logits: Tensor, positions: Tensor) -> TaskLosses:
    """Losses of answer positions, without those beyond the input, as in transformers: (batch, length) -> (batch,)."""
    length = logits.shape[1]
    positions = positions.view(len(logits)).clamp(0, length)
    losses = F.cross_entropy(logits, positions, ignore_index=length, reduction="none")
    return TaskLosses(losses, (positions < length).to(losses.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    try:
        return F.cross_entropy(
            logits, labels.long(), ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="none"
        )
    except IndexError as error:
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(
            f"labels from {low} to {high} for a model of {logits.shape[-1]} classes; expected 0 to "
            f"{logits.shape[-1] - 1}, or {IGNORED} for no label. Set num_labels when you load the model, or mend the "
            "labels."
        ) from error


def _as_part(losses: TaskLosses) -> TaskLosses:
    return TaskLosses(losses.values.unsqueeze(1), losses.weights.unsqueeze(1))


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    # A tuple begins with the loss, a scalar, when the model was given labels.
    return next((output for output in outputs if isinstance(output, Tensor) and output.ndim > 0), None)


def _wrong_labels(labels: Tensor, expected: str, num_classes: int) -> str:
    return (
        f"labels are {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}; expected {expected} "
        f"for {num_classes} labels. Integers mean one class an example, floats mean multi-label classification; "
        "config.problem_type decides when it is set."
    )


def _no_labels(inputs: Mapping[str, Any]) -> str:
    return (
        f"the batch has no `labels`, only {', '.join(inputs)}. Give the data set a column of that name with numbers "
        "(text does not become a tensor), or the trainer a per_example_loss_func(outputs, inputs) that returns the "
        "loss of each example."
    )


def _unknown(outputs: Any, inputs: Mapping[str, Any]) -> str:
    shapes = {
        name: tuple(value.shape)
        for source in (outputs if isinstance(outputs, Mapping) else {}, inputs)
        for name, value in source.items()
        if isinstance(value, Tensor) and ("logits" in name or "label" in name or "position" in name)
    }
    return (
        f"no per-example loss is known for outputs {type(outputs).__name__} with {shapes or 'no logits or labels'}. "
        "Give the trainer a per_example_loss_func(outputs, inputs) that returns the loss of each example, shape "
        "(batch,) or (batch, parts)."
    )
