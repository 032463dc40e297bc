"""A short Hugging Face script: trains a tiny model with the Trainer and saves its metrics."""

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


class Tokens(Dataset):
    def __init__(self):
        self.ids = torch.randint(5, 40, (16, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row, 0] % 2}


(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
args.use_cpu, args.report_to, args.learning_rate = True, [], 1e-2
set_seed(args.seed)
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens())
trainer.train()
trainer.save_metrics("eval", trainer.evaluate())
