"""The arguments of run_prf.py beside the trainer's own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.checks.settings import check_launch

TRAINING_SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "seed",
)  # fmt: skip


@dataclass
class PrfArguments:
    """Collections, first pass, the reformulator's input and the evaluation."""

    model_name_or_path: str = field(metadata={"help": "Encoder that the reformulator starts from: Hub name or folder"})
    first_pass_dir: str = field(metadata={"help": "Where vectors, indexes and first-pass runs are kept"})
    train_collection: str | None = field(default=None, metadata={"help": "Folder, folder:split or ir_datasets name"})
    test_collections: list[str] = field(default_factory=list, metadata={"help": "As train_collection; several"})
    num_folds: int | None = field(default=None, metadata={"help": "Split train_collection by query and test on it"})
    demo_dir: str | None = field(default=None, metadata={"help": "Write the demo collection and encoder here first"})
    relevance_level: int | None = field(
        default=None,
        metadata={
            "help": "Lowest judgement that the binary measures count as relevant; default: the collection's own"
        },
    )
    train_relevance_level: int | None = field(
        default=None, metadata={"help": "Lowest judgement of a positive in training; default: the collection's own"}
    )
    representation: str = field(default="dense", metadata={"help": "dense or sparse"})
    pooling: str = field(default="first", metadata={"help": "Dense: first token or mean"})
    normalize: bool = field(default=False, metadata={"help": "L2-normalize vectors"})
    scale: float = field(default=1.0, metadata={"help": "Factor of query and passage vectors, after normalization"})
    log_saturation: bool = field(default=False, metadata={"help": "Sparse: log(1 + weight), as SPLADE's encoders"})
    first_weighted_id: int | None = field(
        default=None,
        metadata={
            "help": "Sparse: vocabulary ids below this get no weight, except [UNK] (999 in BERT's vocabulary, as "
            "published); default: only the special tokens get none"
        },
    )
    passage_encoder: str | None = field(default=None, metadata={"help": "Where it is another than the reformulator"})
    passage_vectors: str | None = field(default=None, metadata={"help": "Sparse: folder of published jsonl vectors"})
    passage_vector_scale: float = field(default=1.0, metadata={"help": "Factor of the published vectors' weights"})
    train_run: str | None = field(default=None, metadata={"help": "TREC run as the training queries' first pass"})
    test_runs: list[str] = field(default_factory=list, metadata={"help": "TREC runs, one a test collection"})
    encoding_length: int = field(default=128, metadata={"help": "Tokens of a passage in the first pass"})
    encoding_batch_size: int = field(default=64, metadata={"help": "Passages or queries encoded at once"})
    encoding_dtype: str = field(default="float32", metadata={"help": "Of dense vectors: float32 or float16"})
    encoding_terms: int | None = field(default=None, metadata={"help": "Sparse: a passage's largest weights; all"})
    index: str = field(default="Flat", metadata={"help": "FAISS factory string: Flat, HNSW32, IVF4096,Flat, …"})
    index_depth: int = field(default=128, metadata={"help": "IVF lists or HNSW candidates visited in a search"})
    feedback_passages: int = field(default=5, metadata={"help": "Largest number of feedback passages"})
    query_length: int = field(default=128, metadata={"help": "Tokens of a query"})
    passage_length: int = field(default=128, metadata={"help": "Tokens of a feedback passage"})
    total_length: int = field(default=512, metadata={"help": "Tokens of the reformulator's whole input"})
    candidates: int = field(default=20, metadata={"help": "A training query's top passages in the training pool"})
    pool_chunk_size: int | None = field(default=None, metadata={"help": "Pool passages on the device at a time"})
    retrieval_depth: int = field(default=1000, metadata={"help": "Passages retrieved in evaluation"})

    def __post_init__(self) -> None:
        if self.representation not in ("dense", "sparse"):
            raise ValueError(f"--representation {self.representation} is unknown; give dense or sparse")
        if self.passage_vectors and self.representation == "dense":
            raise ValueError("--passage_vectors are sparse; give --representation sparse, or leave them out")
        if self.encoding_dtype not in ("float32", "float16"):
            raise ValueError(f"--encoding_dtype {self.encoding_dtype} is unknown; give float32 or float16")
        if self.encoding_dtype != "float32" and self.representation == "sparse":
            raise ValueError(
                f"--encoding_dtype {self.encoding_dtype} is for dense vectors; leave it out, and bound the size of "
                "sparse ones by --encoding_terms"
            )
        sparse = self.log_saturation or self.encoding_terms is not None or self.first_weighted_id is not None
        if self.representation == "dense" and sparse:
            raise ValueError(
                "--log_saturation, --encoding_terms and --first_weighted_id are for --representation sparse; leave "
                "them out"
            )
        for name in ("feedback_passages", "candidates", "encoding_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        for name, least in (("query_length", 3), ("passage_length", 2)):  # [CLS] and [SEP] count
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected {least} or more, with the special tokens")
        if self.total_length < self.query_length + self.passage_length:
            raise ValueError(
                f"--total_length {self.total_length} has no room for a passage ({self.passage_length} tokens) after a "
                f"query ({self.query_length}); raise it or lower --query_length and --passage_length"
            )
        if self.retrieval_depth < self.feedback_passages:
            raise ValueError(
                f"--retrieval_depth {self.retrieval_depth} is less than --feedback_passages {self.feedback_passages}; "
                "raise the one or lower the other"
            )
        if self.encoding_terms is not None and (self.encoding_terms < 1 or self.passage_vectors):
            raise ValueError(
                f"--encoding_terms {self.encoding_terms} is how many weights of a passage's vector are kept; give at "
                "least 1, and leave it out with --passage_vectors, which are taken whole"
            )
        if self.num_folds is not None and (self.num_folds < 2 or self.test_collections or not self.train_collection):
            raise ValueError(
                f"--num_folds {self.num_folds} splits --train_collection into at least 2 parts and tests on each; "
                "give --train_collection and leave --test_collections out"
            )
        if self.test_runs and len(self.test_runs) != len(self.test_collections):
            raise ValueError(
                f"--test_runs has {len(self.test_runs)} files for {len(self.test_collections)} "
                "--test_collections; give one for each, in their order"
            )


def check_training(data_args: PrfArguments, args: CmpTrainingArguments) -> None:
    """Raises ValueError where the arguments, or the launch, do not fit a reformulator's training."""
    check_launch(args.world_size)
    args.remove_unused_columns = False  # the collator reads queries, not columns
    if args.do_train and not data_args.train_collection:
        raise ValueError("--do_train needs --train_collection")
    if args.cmp_num_crops and args.cmp_crop_order != "prefix":
        raise ValueError(
            f"--cmp_crop_order {args.cmp_crop_order} would leave gaps in the feedback; give --cmp_crop_order prefix"
        )


def settings_of(data_args: PrfArguments, args: CmpTrainingArguments, content: dict[str, Any]) -> dict[str, Any]:
    """What the results depend on, comparable after a round trip through JSON. `content`: hashes of what is read."""
    compared = {name: value for name, value in vars(args).items() if name.startswith("cmp_")}
    training = {name: getattr(args, name, None) for name in TRAINING_SETTINGS}  # transformers 5 has no warmup_ratio
    settings = {"prf": asdict(data_args), "training": training, "comparative": compared, "content": content}
    return json.loads(json.dumps(settings))


def differences(found: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The names of the settings that differ, `training.seed`."""
    names = []
    for group in sorted(found.keys() | settings.keys()):
        there, here = found.get(group) or {}, settings.get(group) or {}
        names += [
            f"{group}.{name}" for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)
        ]
    return names
