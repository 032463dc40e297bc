"""An existing script: it knows nothing of comparative loss. Fine-tunes a tiny classifier on made-up token ids."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accuracy_trainer import AccuracyTrainer
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class DataArguments:
    rows: int = field(default=16, metadata={"help": "How many examples to make"})
    fail: bool = field(default=False, metadata={"help": "Raise an error instead of training"})
    no_dropout: bool = field(default=False, metadata={"help": "Train a model in which nothing drops"})


class Tokens(Dataset):
    def __init__(self, rows: int) -> None:
        self.ids = torch.randint(5, 40, (rows, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": self.ids[row], "labels": self.ids[row, 0] % 2}


def main() -> None:
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    if data_args.fail:
        raise RuntimeError("the script failed")
    torch.manual_seed(args.seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if data_args.no_dropout else {}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **rates))
    data = Tokens(data_args.rows)
    trainer = AccuracyTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    found = {
        "metrics": trainer.evaluate(),
        "logs": trainer.state.log_history,
        "trainer": [kind.__name__ for kind in type(trainer).__mro__],
        "every way of import": [
            Trainer.__name__,
            transformers.Trainer.__name__,
            transformers.trainer.Trainer.__name__,
            transformers.Seq2SeqTrainer.__name__,
            transformers.training_args.TrainingArguments.__name__,
            transformers.Seq2SeqTrainingArguments.__name__,
        ],
        "processes": args.world_size,
    }
    if trainer.is_world_process_zero():
        Path(args.output_dir, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
