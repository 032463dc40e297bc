"""The trainers of sentence-transformers: their losses are computed without Trainer.compute_loss, and compared too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

from cmp_trainer.losses.shares import CannotCompare
from tests.helpers import SMALL, letter_tokenizer
from tests.recipes.recipe import (
    COMPARED,
    ORDERS,
    Recipe,
    assert_a_curve_leaves_no_traces,
    assert_evaluation_leaves_no_traces,
    assert_every_variant_is_logged,
    assert_first_logs_agree,
    assert_orders_of_bases_are_equal,
    assert_saved_models_load,
    assert_trains_as_without_dropout,
    combined,
    step_logs,
    texts,
)

st = pytest.importorskip("sentence_transformers", reason="these recipes need `pip install sentence-transformers`")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
cross_encoder_losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")

ROWS = 24
BINARY = [row % 2 for row in range(ROWS)]
COLUMNS = {
    "pairs": {"anchor": texts(ROWS, 1), "positive": texts(ROWS, 2)},
    "triplets": {"anchor": texts(ROWS, 1), "positive": texts(ROWS, 2), "negative": texts(ROWS, 3)},
    "labelled": {"one": texts(ROWS, 1), "other": texts(ROWS, 2), "label": BINARY},
    "scored": {"one": texts(ROWS, 1), "other": texts(ROWS, 2), "label": [row / ROWS for row in range(ROWS)]},
    "classes": {"one": texts(ROWS, 1), "other": texts(ROWS, 2), "label": [row % 3 for row in range(ROWS)]},
}


def saved(kind: Any, dropout: float, folder: Path, **changes: Any) -> str:
    """A tiny BERT and its tokenizer, on disk."""
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    kind(BertConfig(**SMALL, **rates, **changes)).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def embedding_model(dropout: float, folder: Path) -> Any:
    transformer = modules.Transformer(saved(BertModel, dropout, folder))
    torch.manual_seed(0)  # of the weights that a loss may have
    return st.SentenceTransformer(modules=[transformer, modules.Pooling(SMALL["hidden_size"])])


def embedding(columns: str, make_loss: Callable[[Any], Any], learning_rate: float = 0.1) -> Recipe:
    """A recipe of an embedding model and a loss."""

    def parts(dropout: float, folder: Path) -> dict[str, Any]:
        model, data = embedding_model(dropout, folder), Dataset.from_dict(COLUMNS[columns])
        return {"model": model, "loss": make_loss(model), "train_dataset": data}

    return Recipe(*EMBEDDING, parts, {"learning_rate": learning_rate})


def two_datasets(dropout: float, folder: Path) -> dict[str, Any]:
    """Batches of pairs and of labelled pairs in turn, each with a loss of its own."""
    model = embedding_model(dropout, folder)
    loss = {"pairs": losses.MultipleNegativesRankingLoss(model), "labelled": losses.ContrastiveLoss(model)}
    return {"model": model, "loss": loss, "train_dataset": {n: Dataset.from_dict(COLUMNS[n]) for n in loss}}


def reranker(dropout: float, folder: Path) -> dict[str, Any]:
    """Its batches are texts, which the loss turns into tokens."""
    model = st.CrossEncoder(saved(BertForSequenceClassification, dropout, folder, num_labels=1))
    loss, data = cross_encoder_losses.BinaryCrossEntropyLoss(model), Dataset.from_dict(COLUMNS["labelled"])
    return {"model": model, "loss": loss, "train_dataset": data}


def matryoshka(**changes: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8], **changes)

    return make


EMBEDDING = (st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments)
RERANKER = (st.CrossEncoderTrainer, st.cross_encoder.CrossEncoderTrainingArguments)
RANKING_RATE = 0.01  # similarities are scaled by 20, and so are gradients
RECIPES = {
    "ranking": embedding("pairs", losses.MultipleNegativesRankingLoss, RANKING_RATE),
    "ranking-triplets": embedding("triplets", losses.MultipleNegativesRankingLoss, RANKING_RATE),
    "contrastive": embedding("labelled", losses.ContrastiveLoss),
    "triplet": embedding("triplets", losses.TripletLoss),
    "cosine": embedding("scored", losses.CosineSimilarityLoss),
    "softmax": embedding("classes", lambda model: losses.SoftmaxLoss(model, SMALL["hidden_size"], num_labels=3)),
    "matryoshka": embedding("pairs", matryoshka(), RANKING_RATE),
    "matryoshka-random": embedding("pairs", matryoshka(n_dims_per_step=1), RANKING_RATE),  # by Python's random
    "two-datasets": Recipe(
        *EMBEDDING, two_datasets, {"learning_rate": RANKING_RATE, "multi_dataset_batch_sampler": "round_robin"}
    ),
    "reranker": Recipe(*RERANKER, reranker, {"learning_rate": 1.0}),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
each_order = pytest.mark.parametrize("plugin_first", ORDERS.values(), ids=ORDERS)


@each_order
@each_recipe
def test_the_full_loss_alone_trains_as_without_dropout(recipe, plugin_first, tmp_path):
    assert_trains_as_without_dropout(recipe, tmp_path, plugin_first)


@each_recipe
def test_gradient_accumulation_keeps_the_scale_of_the_loss(recipe, tmp_path):
    assert_trains_as_without_dropout(recipe, tmp_path, plugin_first=False, gradient_accumulation_steps=2)


@each_recipe
def test_a_comparison_logs_the_loss_of_every_variant(recipe, tmp_path):
    assert_every_variant_is_logged(recipe, tmp_path)


@each_recipe
def test_the_full_variant_is_logged_as_the_loss_of_the_plain_trainer(recipe, tmp_path):
    plain, ours = recipe.plain(tmp_path), recipe.compared(tmp_path, **COMPARED)
    assert_first_logs_agree(plain, ours)
    assert abs(step_logs(ours)[0]["loss_full"] - step_logs(plain)[0]["loss"]) < 1e-4


@each_recipe
def test_both_orders_of_bases_train_the_same_weights(recipe, tmp_path):
    assert_orders_of_bases_are_equal(recipe, tmp_path)


def test_a_cached_loss_is_rejected(tmp_path):
    """It runs the model in batches again, with their random state, when the loss's backward arrives."""

    def cached(model: Any) -> Any:
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)

    with pytest.raises(CannotCompare, match="no part of the loss belongs to single examples"):
        assert_trains_as_without_dropout(embedding("pairs", cached, RANKING_RATE), tmp_path, plugin_first=False)


each_trainer = pytest.mark.parametrize(
    "recipe", [RECIPES["ranking"], RECIPES["reranker"]], ids=["embedding", "reranker"]
)


@each_trainer
def test_losses_of_variants_in_evaluation_leave_no_traces(recipe, tmp_path):
    assert_evaluation_leaves_no_traces(recipe, tmp_path)


@each_trainer
def test_a_curve_leaves_no_traces(recipe, tmp_path):
    assert_a_curve_leaves_no_traces(recipe, tmp_path)


@each_order
@pytest.mark.parametrize(("name", "kind"), [("ranking", st.SentenceTransformer), ("reranker", st.CrossEncoder)])
def test_checkpoints_are_ordinary_models(name, kind, plugin_first, tmp_path):
    assert_saved_models_load(RECIPES[name], tmp_path, plugin_first, kind)


@each_trainer
def test_combined_arguments_are_checked_at_parsing(recipe, tmp_path):
    with pytest.raises(ValueError, match="cmp_num_crops"):
        combined(recipe.arguments)(output_dir=str(tmp_path), **COMPARED, cmp_num_crops=3)
