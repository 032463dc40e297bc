"""Tiny models, data and trainers for tests, all made from configurations."""

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from tokenizers.implementations import BertWordPieceTokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from cmp_trainer import CmpTrainer, CmpTrainingArguments

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """A BERT classifier with three classes and dropout 0.1 everywhere."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SMALL, "num_labels": 3, **changes}))


def token_data(rows: int = 32, length: int = 8, num_labels: int = 3) -> Dataset:
    """Random token ids whose label follows from the first token."""
    ids = torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = (ids[:, 0] % num_labels).tolist()
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels}
    )


def batch_of(data: Dataset, rows: range = range(4)) -> dict[str, torch.Tensor]:
    """A batch of tensors."""
    return {name: torch.tensor([data[row][name] for row in rows]) for name in data.column_names}


def training_arguments(output_dir: Any, kind: Any = CmpTrainingArguments, **changes: Any) -> Any:
    """Quiet arguments for six steps on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**{**settings, **changes})


def cmp_trainer(
    output_dir: Any, model: Any = None, data: Dataset | None = None, kind: Any = CmpTrainer, **changes: Any
) -> Any:
    """A CmpTrainer of a tiny model; `changes` are training arguments, or `per_example_loss_func` and the like."""
    of_trainer = {
        "per_example_loss_func",
        "objective",
        "ablations",
        "compute_metrics",
        "callbacks",
        "data_collator",
        "compute_loss_func",
        "model_init",
    }
    trainer_changes = {name: changes.pop(name) for name in list(changes) if name in of_trainer}
    if "model_init" not in trainer_changes:
        trainer_changes["model"] = tiny_bert() if model is None else model
    data = token_data() if data is None else data
    args = changes.pop("args", None) or training_arguments(output_dir, **changes)
    return kind(args=args, train_dataset=data, eval_dataset=data, **trainer_changes)


def free_port() -> int:
    """A port for processes that are launched to find each other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradients by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models are equal to the bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT tokenizer whose words are letters, the same in every version of transformers."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?"]
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    special: dict[str, Any] = dict(zip(names, words, strict=False))
    pieces = BertWordPieceTokenizer(vocab={word: index for index, word in enumerate(words)})
    return PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=32, **special)


_READ_BY_OPERATIONS = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
)
_READ_BY_METHODS = ("tolist", "numpy", "cpu")  # seen by no operation where the tensor is on the CPU


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.found["index by a mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _READ_BY_METHODS:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def operations_counted() -> Iterator[Counter[str]]:
    """How often each operation of PyTorch is called in the body, and each method that reads a tensor's values."""
    found: Counter[str] = Counter()
    with _Operations(found), _Methods(found):
        yield found


def waits(found: Counter[str]) -> dict[str, int]:
    """Those among the operations for which the host would wait for a GPU, as they read values of a tensor."""
    reads = ("index by a mask", *_READ_BY_OPERATIONS, *_READ_BY_METHODS)
    return {name: found[name] for name in reads if found[name]}
