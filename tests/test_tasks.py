"""Every task's loss is normalized as Trainer does it, over gradient accumulation with batches of unequal length.

All variants of a model are equal at a dropout rate of 1e-12, which drops nothing. The comparative loss with baseline
zero then is 2 / (c + 2) of the task loss, and the regularized one without ranking the task loss itself.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cmp_trainer import CmpDrop, CmpTrainer
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import training_arguments
from tests.tiny_models import AVAILABLE, CLASSES, PAD, PROPHETNET, VOCABULARY

NUM_ABLATIONS = 2
LENGTHS = (3, 8, 5, 2, 6)
PADDING = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "decoder_input_ids": PAD}


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its head, five examples of unequal length, and what the configuration says of the task."""

    tiny: Any
    examples: list
    settings: dict = dataclasses.field(default_factory=dict)

    def model(self, **settings):
        return self.tiny.build(**{**self.settings, **settings})

    def model_without_dropout(self):
        return self.tiny.build(**{**self.tiny.rates_at_zero, **self.settings})


def texts(**columns):
    """Five texts, each with its own value of every column."""
    texts_alone = [
        {"input_ids": _random_tokens(length, seed=length), "attention_mask": torch.ones(length, dtype=torch.long)}
        for length in LENGTHS
    ]
    return [
        {**text, **dict(zip(columns, values, strict=True))}
        for text, *values in zip(texts_alone, *columns.values(), strict=True)
    ]


def token_labels(num_classes, lengths=LENGTHS):
    """Labels of tokens, with a gap in the second example and none in the third."""
    labels = [_random_tokens(length, seed=9) % num_classes for length in lengths]
    labels[1][:2] = -100
    labels[2][:] = -100
    return labels


def choices():
    """Questions of two choices, which are the text forwards and backwards."""
    width = max(LENGTHS)
    rows = [
        {name: _filled(torch.stack([value, value.flip(0)]), width, PADDING[name]) for name, value in text.items()}
        for text in texts()
    ]
    return [{**row, "labels": torch.tensor(index % 2)} for index, row in enumerate(rows)]


def signals(name, *shape, labels=None):
    """Five images, films or sounds."""
    generator = torch.Generator().manual_seed(2)
    return [
        {name: torch.randn(shape, generator=generator), "labels": label}
        for label in (CLASS_LABELS if labels is None else labels)
    ]


def with_head(model_type, auto_class):
    return dataclasses.replace(AVAILABLE[model_type], auto_class=auto_class)


def _random_tokens(length, seed):
    return torch.randint(6, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def _filled(rows, width, value):
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


CLASS_LABELS = torch.arange(5) % CLASSES
NUMBERS = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])
SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
STARTS, ENDS = torch.tensor([0, 3, 1, 99, 2]), torch.tensor([2, 4, 1, 99, 5])
TARGETS = token_labels(VOCABULARY, (2, 6, 4, 3, 5))

TASKS = {
    "classification": Task(AVAILABLE["bert"], texts(labels=CLASS_LABELS)),
    "multi-label classification": Task(AVAILABLE["bert"], texts(labels=SEVERAL)),
    "regression": Task(AVAILABLE["bert"], texts(labels=NUMBERS), {"num_labels": 1}),
    "regression of several targets": Task(AVAILABLE["bert"], texts(labels=SEVERAL), {"problem_type": "regression"}),
    "question answering": Task(
        with_head("bert", AutoModelForQuestionAnswering),
        texts(start_positions=STARTS, end_positions=ENDS),
        {"num_labels": 2},
    ),
    "token classification": Task(
        with_head("bert", AutoModelForTokenClassification), texts(labels=token_labels(CLASSES))
    ),
    "multiple choice": Task(with_head("bert", AutoModelForMultipleChoice), choices()),
    "masked LM": Task(with_head("bert", AutoModelForMaskedLM), texts(labels=token_labels(VOCABULARY))),
    "masked LM, DistilBERT": Task(
        with_head("distilbert", AutoModelForMaskedLM), texts(labels=token_labels(VOCABULARY))
    ),
    "causal LM, Llama": Task(AVAILABLE["llama"], texts(labels=token_labels(VOCABULARY))),
    "causal LM, GPT-2": Task(AVAILABLE["gpt2"], texts(labels=token_labels(VOCABULARY))),
    "causal LM, OPT": Task(AVAILABLE["opt"], texts(labels=token_labels(VOCABULARY))),
    "causal LM, LLaVA": Task(AVAILABLE["llava"], texts(labels=token_labels(VOCABULARY))),
    "sequence to sequence, T5": Task(AVAILABLE["t5"], texts(labels=TARGETS)),
    "sequence to sequence, BART": Task(AVAILABLE["bart"], texts(labels=TARGETS)),
    "sequence to sequence, Pegasus": Task(AVAILABLE["pegasus"], texts(labels=TARGETS)),
    "image classification": Task(AVAILABLE["vit"], signals("pixel_values", 3, 16, 16)),
    "video classification": Task(AVAILABLE["videomae"], signals("pixel_values", 2, 3, 16, 16)),
    "audio classification": Task(AVAILABLE["wav2vec2"], signals("input_values", 200)),
    "speech to text, Whisper": Task(AVAILABLE["whisper"], signals("input_features", 8, 32, labels=TARGETS)),
}
TOKEN_TASKS = ["token classification", "masked LM", "causal LM, Llama", "sequence to sequence, T5"]
OBJECTIVES = [
    pytest.param({}, id="comparative"),
    pytest.param({"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}, id="full alone"),
    pytest.param({"cmp_objective": "regularized", "cmp_primary": "mean", "cmp_weight": 0.0}, id="mean"),
    pytest.param({"cmp_objective": "regularized", "cmp_primary": "max", "cmp_weight": 0.0}, id="max"),
]
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@every_task
def test_without_ablations_an_accumulated_step_is_that_of_trainer(task, tmp_path):
    loss, gradients = one_update(CmpTrainer, task.model(), task.examples, cmp_arguments(tmp_path, cmp_num_ablations=0))
    expected_loss, expected = one_update(Trainer, task.model(), task.examples, plain_arguments(tmp_path))
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@every_task
def test_an_accumulated_step_is_normalized_as_trainer_normalizes(task, tmp_path):
    loss, gradients = one_update(CmpTrainer, task.model(), task.examples, cmp_arguments(tmp_path))
    expected_loss, expected = of_trainer(task, plain_arguments(tmp_path))
    assert loss * SCALE == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected, SCALE)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["multi-label classification", "question answering", "masked LM", "causal LM, Llama"])
def test_every_objective_is_normalized_as_trainer_normalizes(objective, name, tmp_path):
    task, scale = TASKS[name], 1 if objective else SCALE
    loss, gradients = one_update(CmpTrainer, task.model(), task.examples, cmp_arguments(tmp_path, **objective))
    expected_loss, expected = of_trainer(task, plain_arguments(tmp_path))
    assert loss * scale == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected, scale)


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_a_batch_of_one_example_without_labels_counts_nothing(name, tmp_path):
    task = TASKS[name]
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    loss, gradients = one_update(CmpTrainer, task.model(), task.examples, cmp_arguments(tmp_path, **alone))
    assert torch.tensor(loss).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if name.startswith("causal"):  # the others' loss is NaN in Trainer then, since they ignore the count of labels
        assert_equal_gradients(gradients, of_trainer(task, plain_arguments(tmp_path))[1], SCALE)


@pytest.mark.parametrize(
    "name", ["classification", "token classification", "masked LM", "causal LM, Llama", "sequence to sequence, T5"]
)
def test_label_smoothing_is_that_of_trainer(name, tmp_path):
    task = dataclasses.replace(TASKS[name], examples=[ready_to_smooth(row, name) for row in TASKS[name].examples])
    smoothed = {"label_smoothing_factor": 0.1}
    loss, gradients = one_update(CmpTrainer, task.model(), task.examples, cmp_arguments(tmp_path, **smoothed))
    expected_loss, expected = of_trainer(task, plain_arguments(tmp_path, **smoothed))
    assert loss * SCALE == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected, SCALE)


def test_the_logged_loss_under_label_smoothing_is_that_of_the_full_model(tmp_path):
    task, smoothed = TASKS["classification"], {"label_smoothing_factor": 0.1, "max_steps": 1, "logging_steps": 1}
    plain = Trainer(task.model_without_dropout(), plain_arguments(tmp_path, **smoothed), train_dataset=task.examples)
    ours = CmpTrainer(task.model(), cmp_arguments(tmp_path, **smoothed), train_dataset=task.examples)
    for trainer in (plain, ours):
        trainer.data_collator = padded
        trainer.train()
    assert ours.state.log_history[0]["loss_full"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["regression", "multi-label classification"])
def test_label_smoothing_of_labels_that_are_no_classes_fails_as_in_trainer(name, tmp_path):
    task, smoothed, errors = TASKS[name], {"label_smoothing_factor": 0.1}, []
    for kind, arguments in ((Trainer, plain_arguments), (CmpTrainer, cmp_arguments)):
        with pytest.raises(RuntimeError) as error:
            one_update(kind, task.model(), task.examples, arguments(tmp_path, **smoothed))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


PRIMARY_LOSS = {  # (batch, 1 + c) -> (batch,)
    "max": lambda losses: losses.amax(-1),
    "mean": lambda losses: losses.mean(-1),
    "full": lambda losses: losses[:, 0],
    "last": lambda losses: losses[:, -1],
}


@pytest.mark.parametrize("primary", PRIMARY_LOSS)
def test_the_primary_loss_of_an_answer_is_that_of_start_and_end_together(primary, tmp_path):
    task = TASKS["question answering"]
    model, batch = task.model().train(), padded(task.examples)
    settings = {"cmp_objective": "regularized", "cmp_primary": primary, "cmp_weight": 0.0, "cmp_dropout": 0.4}
    trainer = CmpTrainer(model, cmp_arguments(tmp_path, **settings))
    torch.manual_seed(4)
    found = trainer.compute_loss(model, dict(batch))
    found.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    labelled = batch["start_positions"] < max(LENGTHS)
    losses = []
    for drops in range(1 + NUM_ABLATIONS):
        torch.manual_seed(4)
        with Ablated([CmpDrop(base_rate=0.4)], [drops]):
            outputs = model(batch["input_ids"], batch["attention_mask"])
        start = torch.nn.functional.cross_entropy(outputs.start_logits[labelled], STARTS[labelled], reduction="none")
        end = torch.nn.functional.cross_entropy(outputs.end_logits[labelled], ENDS[labelled], reduction="none")
        losses.append((start + end) / 2)
    expected = PRIMARY_LOSS[primary](torch.stack(losses, -1)).mean()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(found, expected)
    assert_equal_gradients(gradients, {name: p.grad for name, p in model.named_parameters()}, 1)


MORE_THAN_THE_LABELS = {
    "n-grams of ProphetNet": PROPHETNET,
    "router loss of Mixtral": AVAILABLE["mixtral"],
    "CTC": with_head("wav2vec2", AutoModelForCTC),
    "segmentation": with_head("segformer", AutoModelForSemanticSegmentation),
}


@pytest.mark.parametrize("name", MORE_THAN_THE_LABELS)
def test_a_loss_that_is_more_than_that_of_the_labels_is_the_models_own(name, tmp_path):
    tiny = MORE_THAN_THE_LABELS[name]
    model, batch = tiny.build(output_router_logits=True), tiny.batch()
    if name == "CTC":
        batch["labels"] = torch.tensor([[5, 6, 7], [8, 9, -100]])
    if name == "segmentation":
        batch["labels"] = torch.arange(2 * 16 * 16).reshape(2, 16, 16) % 3
    full_only = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
    trainer = CmpTrainer(model, cmp_arguments(tmp_path, **{"cmp_dropout": 0.1, **full_only}))
    found = trainer.compute_loss(model.train(), dict(batch))
    with Ablated([CmpDrop()], [0]):  # in train mode, as batch norm is part of one of them
        torch.testing.assert_close(found, model(**batch).loss)


def test_a_causal_model_whose_class_was_renamed_by_what_wraps_it_keeps_its_own_loss(tmp_path):
    tiny = AVAILABLE["gpt2"]
    model, batch = tiny.build(), tiny.batch()
    model.__class__ = type("FSDPGPT2LMHeadModel", (type(model),), {})  # as FSDP2 makes one
    full_only = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0, "cmp_dropout": 0.1}
    found = CmpTrainer(model, cmp_arguments(tmp_path, **full_only)).compute_loss(model.train(), dict(batch))
    torch.testing.assert_close(found, model.eval()(**batch).loss)


def test_speech_recognition_with_ctc_compares_the_losses_that_the_user_gives(tmp_path):
    def ctc_losses(outputs, inputs):
        log_probabilities = outputs.logits.log_softmax(-1).transpose(0, 1)  # (frames, batch, characters)
        frames = torch.full((len(inputs["labels"]),), len(log_probabilities))
        lengths = (inputs["labels"] >= 0).sum(-1)
        return torch.nn.functional.ctc_loss(log_probabilities, inputs["labels"], frames, lengths, reduction="none")

    task = Task(with_head("wav2vec2", AutoModelForCTC), signals("input_values", 200, labels=TARGETS[:2] + TARGETS[3:]))
    arguments = cmp_arguments(tmp_path, cmp_dropout=0.1)
    callback = GradientsOfTheStep()
    trainer = CmpTrainer(
        task.model(),
        arguments,
        train_dataset=task.examples,
        data_collator=padded,
        callbacks=[callback],
        per_example_loss_func=ctc_losses,
    )
    assert trainer.train().training_loss > 0
    assert all(gradient.isfinite().all() for gradient in callback.gradients.values())


def ready_to_smooth(row, name):
    """With what label smoothing needs: decoder inputs; no label of a first token, which nothing predicts."""
    labels = row["labels"].clone()
    if name.startswith("causal"):
        labels[0] = -100
    if name.startswith("sequence"):
        return {**row, "decoder_input_ids": torch.cat([torch.zeros(1, dtype=torch.long), labels[:-1].clamp(min=PAD)])}
    return {**row, "labels": labels}


def padded(rows):
    """A batch of examples, padded to its longest."""
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=PADDING[name])
        if rows[0][name].ndim == 1 and rows[0][name].dtype == torch.long
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }


STEPS = 3
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": STEPS,
    "remove_unused_columns": False,
}
SCALE = (NUM_ABLATIONS + 2) / 2


def plain_arguments(folder, **changes):
    return training_arguments(folder, TrainingArguments, **{**ONE_STEP, **changes})


def cmp_arguments(folder, **changes):
    """Ablations that ablate nothing."""
    nothing = {"cmp_num_ablations": NUM_ABLATIONS, "cmp_dropout": 1e-12}
    return training_arguments(folder, **{**ONE_STEP, **nothing, **changes})


def of_trainer(task, arguments):
    """Trainer's own loss and gradients of the five examples in the model without dropout."""
    return one_update(Trainer, task.model_without_dropout(), task.examples, arguments)


class GradientsOfTheStep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }


def one_update(kind, model, examples, arguments):
    """Loss and gradients of one optimizer step, taken by the Trainer's own loop."""
    callback = GradientsOfTheStep()
    trainer = kind(model, arguments, train_dataset=examples, data_collator=padded, callbacks=[callback])
    return trainer.train().training_loss, callback.gradients


def assert_equal_gradients(gradients, expected, scale):
    assert gradients.keys() == expected.keys()
    size = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(gradients[name] * scale, expected[name], rtol=1e-5, atol=1e-6 * float(size))
