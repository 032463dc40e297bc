"""A demo without downloads: a generated collection and small encoders made from it.

The collection has topics, each with several aspects; a passage mixes background words with words of its topic and its
aspect, a query names two or three of them, and relevant are the passages of its aspect. Because a passage holds only
some words of its aspect, a query misses many relevant passages by its own words, and feedback passages supply the
rest.

The dense encoder is a BERT of two layers whose word embeddings are a latent semantic analysis (truncated SVD of
tf-idf) of the collection and whose layers start as the identity (their output projections are zero): before training
its mean pooling is an LSA vector, no more. Training opens the layers.

The sparse encoder is the same BERT with a masked-language-model head that starts as the identity too: a vocabulary
entry's logit is its LSA similarity to a token, less a threshold that only near words pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

TOPICS, ASPECTS, PASSAGES, QUERIES = 16, 4, 8, 3  # aspects of a topic, passages and queries of an aspect
TOPIC_WORDS, ASPECT_WORDS, BACKGROUND_WORDS = 12, 14, 200
PASSAGE_WORDS, HIDDEN = 24, 64
THRESHOLD = 0.8  # of a vocabulary entry's similarity to a token; 130 of 1,214 entries pass it in an average passage
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_demo(folder: str | Path, seed: int = 0) -> None:
    """Write `folder/collection` (BEIR form, splits train and test), `folder/encoder` and `folder/masked_lm`, unless
    they are there.

    The same seed gives the same collection."""
    folder = Path(folder)
    if not (folder / "masked_lm" / "tokenizer.json").exists():  # the last file written
        texts = write_collection(folder / "collection", np.random.default_rng(seed))
        write_encoders(folder, texts, seed)


def write_collection(folder: Path, random: np.random.Generator) -> list[str]:
    """The passages' texts, after writing corpus, queries and judgements; every third query is for testing."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    words = pseudo_words(random)
    background = [next(words) for _ in range(BACKGROUND_WORDS)]
    passages, queries, qrels = [], [], {"train": [], "test": []}
    for topic in range(TOPICS):
        of_topic = [next(words) for _ in range(TOPIC_WORDS)]
        for aspect in range(ASPECTS):
            of_aspect = [next(words) for _ in range(ASPECT_WORDS)]
            for number in range(PASSAGES):
                drawn = [*random.choice(of_topic, 4), *random.choice(of_aspect, 4)]
                drawn += list(random.choice(background, PASSAGE_WORDS - len(drawn)))
                text = " ".join(random.permutation(drawn))
                passages.append({"_id": f"p{topic}-{aspect}-{number}", "title": "", "text": text})
            for number in range(QUERIES):
                drawn = [random.choice(of_topic), *random.choice(of_aspect, 2, replace=False)]
                query = f"q{topic}-{aspect}-{number}"
                queries.append({"_id": query, "text": " ".join(drawn)})
                split = "test" if number == 0 else "train"
                qrels[split] += [f"{query}\tp{topic}-{aspect}-{passage}\t1" for passage in range(PASSAGES)]
    for name, records in (("corpus", passages), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return [passage["text"] for passage in passages]


def write_encoders(folder: Path, texts: list[str], seed: int) -> None:
    """A small BERT, its word embeddings from the texts, with a tokenizer of whole words; with and without a head."""
    torch.manual_seed(seed)
    weighting = TfidfVectorizer(token_pattern=r"\S+")
    weights = weighting.fit_transform(texts)
    analysis: Any = TruncatedSVD(HIDDEN, random_state=seed).fit(weights)
    vocabulary = SPECIAL + list(weighting.get_feature_names_out())
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * HIDDEN, max_position_embeddings=512, layer_norm_eps=1e-5,
        )
    )  # fmt: skip
    with torch.no_grad():
        embeddings = model.embeddings
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        # special tokens are random: a layer norm of zeros has no usable gradient
        embeddings.word_embeddings.weight[: len(SPECIAL)].normal_(std=0.02)
        embeddings.word_embeddings.weight[len(SPECIAL) :] = torch.from_numpy(analysis.components_.T).float()
        layers: Any = model.encoder.layer
        for layer in layers:
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    words = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **names)
    for name, saved in (("encoder", model), ("masked_lm", with_head(model))):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def with_head(model: BertModel) -> BertForMaskedLM:
    masked_lm = BertForMaskedLM(model.config)
    masked_lm.bert.load_state_dict(model.state_dict(), strict=False)  # all but the pooler, which it lacks
    head: Any = masked_lm.cls.predictions
    with torch.no_grad():
        head.transform.dense.weight.copy_(torch.eye(HIDDEN))
        head.transform.dense.bias.fill_(4.0)  # where GELU is linear; the layer norm after it takes the shift off again
        head.bias.fill_(-THRESHOLD)
    return masked_lm


def pseudo_words(random: np.random.Generator) -> Iterator[str]:
    """Pronounceable words, none twice."""
    consonants, vowels, seen = list("bdfgklmnprstvz"), list("aeiou"), set()
    while True:
        syllables = random.integers(2, 4)
        word = "".join(random.choice(consonants) + random.choice(vowels) for _ in range(syllables))
        if word not in seen:
            seen.add(word)
            yield word
