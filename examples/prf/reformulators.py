"""Query reformulators: a text encoder that reads the query and its feedback passages and writes a better query vector.

A reformulator is an ordinary encoder, `q' = pool(encoder([CLS] query [SEP] passage 1 [SEP] … passage k [SEP]))`.
Passage vectors stay those of the first pass, so an index is built once and any reformulated query can be searched in
it. The same classes encode queries and passages alone (k = 0): the first pass is the reformulator before training.

- `DenseReformulator`: first-token or mean pooling, optionally a linear layer with layer norm (the layout of
  castorini/ance-msmarco-passage: RoBERTa, linear 768, layer norm) and L2 normalization.
- `SparseReformulator`: a masked-language-model head, maximum over the tokens, ReLU, some vocabulary ids zeroed,
  optionally log(1 + weight) and L2 normalization: one weight for each vocabulary entry. The maximum runs over every
  token of the input, [CLS] and [SEP] too, as in the published reformulator and in SPLADE; what is zeroed is their
  entries. The published reformulator zeroes BERT's ids 0 … 998, which are no words, except [UNK].

Sources: Yu et al., "Improving Query Representations for Dense Retrieval with Pseudo Relevance Feedback" (CIKM 2021);
"LoL: A Comparative Regularization Loss over Query Reformulation Losses for Pseudo-Relevance Feedback" (SIGIR 2022).
This file imports transformers and torch only, for it is saved beside the weights: a trained reformulator loads with
`AutoModel.from_pretrained(folder, trust_remote_code=True)` where this project is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file


@dataclass
class ReformulatorOutput(ModelOutput):
    """`query_vectors`: (batch, dimension), to be searched by inner product."""

    query_vectors: torch.Tensor | None = None


class DenseReformulatorConfig(PretrainedConfig):
    """`encoder`: the wrapped encoder's own config as a dictionary. `scale` multiplies the vectors in training and
    search
    alike: with normalized vectors the inner products lie in [-1, 1], too flat for a softmax over a pool of
    passages."""

    model_type = "prf-dense-reformulator"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        pooling: str = "first",
        projection_size: int | None = None,
        normalize: bool = False,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling {pooling!r} is unknown; give first or mean")
        self.encoder = encoder
        self.pooling = pooling
        self.projection_size = projection_size
        self.normalize = normalize
        self.scale = scale
        super().__init__(**kwargs)


class DenseReformulator(PreTrainedModel):
    """Token ids (batch, length) -> query vectors (batch, dimension)."""

    config_class = DenseReformulatorConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: DenseReformulatorConfig) -> None:
        super().__init__(config)
        inner = encoder_config(config)
        self.encoder = AutoModel.from_config(inner)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # unused: its weights would get no gradient
        size = config.projection_size
        self.projection = nn.Linear(inner.hidden_size, size) if size else None
        self.norm = nn.LayerNorm(size) if size else None
        self.post_init()

    @property
    def dimension(self) -> int:
        return self.config.projection_size or self.encoder.config.hidden_size

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> ReformulatorOutput:
        """`labels` (the positives of each query) are for the loss, which is computed outside: see `pool_loss`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.pooling == "first":
            vectors = states[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            vectors = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        if self.projection is not None and self.norm is not None:
            vectors = self.norm(self.projection(vectors))
        if self.config.normalize:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return ReformulatorOutput(query_vectors=vectors * self.config.scale)

    @classmethod
    def from_encoder(
        cls, name: str, pooling: str = "first", normalize: bool = False, scale: float = 1.0
    ) -> DenseReformulator:
        """A reformulator that starts as the encoder `name`, a Hub name or a folder. A head in the layout of
        castorini/ance-msmarco-passage (`embeddingHead`, `norm`) is found by its weights and taken along."""
        inner = AutoConfig.from_pretrained(name)
        settings = {"pooling": pooling, "normalize": normalize, "scale": scale}
        weights = head_weights(name) if inner.model_type == "roberta" else None
        if weights is None:
            model = cls(DenseReformulatorConfig(encoder=inner.to_dict(), **settings))
            model.encoder.load_state_dict(without_pooler(AutoModel.from_pretrained(name).state_dict()))
            return model
        size = weights["projection.weight"].shape[0]
        model = cls(DenseReformulatorConfig(encoder=inner.to_dict(), projection_size=size, **settings))
        missing, _ = model.load_state_dict(weights, strict=False)
        if missing:
            raise ValueError(f"{name} has an ANCE head but lacks {len(missing)} weights, e.g. {missing[0]}")
        return model


class SparseReformulatorConfig(PretrainedConfig):
    """`zeroed_ids`: vocabulary entries that never get a weight. `log_saturation`: log(1 + weight), as in SPLADE."""

    model_type = "prf-sparse-reformulator"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        zeroed_ids: list[int] | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        log_saturation: bool = False,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder
        self.zeroed_ids = zeroed_ids or []
        self.log_saturation = log_saturation
        self.normalize = normalize
        self.scale = scale
        super().__init__(**kwargs)


class SparseReformulator(PreTrainedModel):
    """Token ids (batch, length) -> query vectors (batch, vocabulary), non-negative and mostly zero."""

    config_class = SparseReformulatorConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SparseReformulatorConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModelForMaskedLM.from_config(encoder_config(config))
        self._dynamic_tied_weights_keys = ["predictions.decoder.bias"]  # transformers 4 misses it inside of a model
        self.post_init()

    @property
    def dimension(self) -> int:
        return self.encoder.config.vocab_size

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> ReformulatorOutput:
        """`labels` (the positives of each query) are for the loss, which is computed outside: see `pool_loss`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        logits = self.encoder(input_ids=input_ids, attention_mask=attention_mask).logits  # (batch, length, vocabulary)
        padding = attention_mask.unsqueeze(-1) == 0
        vectors = logits.masked_fill(padding, float("-inf")).amax(dim=1).relu()
        zeroed = torch.tensor(self.config.zeroed_ids, dtype=torch.long, device=vectors.device)
        vectors = vectors.index_fill(1, zeroed, 0.0)
        if self.config.log_saturation:
            vectors = vectors.log1p()
        if self.config.normalize:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return ReformulatorOutput(query_vectors=vectors * self.config.scale)

    @classmethod
    def from_encoder(
        cls,
        name: str,
        normalize: bool = True,
        scale: float = 1.0,
        log_saturation: bool = False,
        first_weighted_id: int | None = None,
    ) -> SparseReformulator:
        """A reformulator that starts as the masked language model `name`, a Hub name or a folder.

        The special tokens get no weight; with `first_weighted_id`, no id below it does, and [UNK] may have one."""
        source = AutoModelForMaskedLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        zeroed = set(tokenizer.all_special_ids)
        if first_weighted_id is not None:
            zeroed = (zeroed | set(range(first_weighted_id))) - {tokenizer.unk_token_id}
        settings = {"normalize": normalize, "scale": scale, "log_saturation": log_saturation}
        model = cls(SparseReformulatorConfig(source.config.to_dict(), sorted(zeroed), **settings))
        model.encoder.load_state_dict(source.state_dict())
        return model


Reformulator = DenseReformulator | SparseReformulator


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The wrapped encoder's config, from the dictionary it is saved as."""
    if config.encoder is None:
        raise ValueError("a reformulator needs an encoder config; build it with from_encoder or from_pretrained")
    settings = dict(config.encoder)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def head_weights(name: str) -> dict[str, torch.Tensor] | None:
    """The weights of an ANCE-layout checkpoint under this project's names; None where there is no such head."""
    path = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    path = path or cached_file(name, "pytorch_model.bin", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None  # sharded checkpoints: none in this layout is that large
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("ance_encoder."): value for key, value in weights.items()}
    if "embeddingHead.weight" not in weights:
        return None
    places = {"roberta.": "encoder.", "embeddingHead.": "projection.", "norm.": "norm."}
    renamed = {
        new + key.removeprefix(old): value
        for key, value in weights.items()
        for old, new in places.items()
        if key.startswith(old)
    }
    return without_pooler(renamed)


def without_pooler(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if "pooler." not in key and "position_ids" not in key}


for config_class, model_class in (
    (DenseReformulatorConfig, DenseReformulator),
    (SparseReformulatorConfig, SparseReformulator),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModel")
