"""Scripts that do not mention comparative loss, all but `own_loop`, in one file.

Usage: train_somehow.py OUTPUT_DIR WAY [more arguments]. Most ways write what they find to OUTPUT_DIR/found.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

QUIET = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}


class Tokens(Dataset):
    def __init__(self):
        self.ids = torch.randint(5, 40, (16, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row, 0] % 2}


def make_trainer(args, kind=Trainer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    return kind(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens())


def train(args):
    trainer = make_trainer(args)
    trainer.train()
    if trainer.is_world_process_zero():
        given = {name: value for name, value in args.to_dict().items() if name.startswith("cmp_")}
        found = {"log": trainer.state.log_history[0], "given": given, "argv": sys.argv[1:]}
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))


def hard_coded_arguments(**changes):
    return TrainingArguments(output_dir=sys.argv[1], **{"save_strategy": "no", **QUIET, **changes})


def hard_coded():
    train(hard_coded_arguments())


def default_arguments():
    """The Trainer makes them itself."""
    args = make_trainer(None).args
    args.output_dir, args.max_steps, args.logging_steps = sys.argv[1], 2, 1
    train(args)


def own_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("way")
    parser.add_argument("--learning_rate", type=float)
    train(hard_coded_arguments(learning_rate=parser.parse_args().learning_rate))


def known_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float)
    known, rest = parser.parse_known_args()
    assert rest == sys.argv[1:3]
    train(hard_coded_arguments(learning_rate=known.learning_rate))


def hf_parser():
    train(*HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[3:]))


def hf_config():
    config = {"output_dir": sys.argv[1], **QUIET, **json.loads(sys.argv[3])}
    train(*HfArgumentParser(TrainingArguments).parse_dict(config))


def exits():
    globals()[sys.argv[3]]()
    sys.exit(int(sys.argv[4]) if sys.argv[4].isdigit() else sys.argv[4])


def raises():
    raise RuntimeError("the script failed")


def forked():
    from accelerate import debug_launcher

    debug_launcher(hard_coded, num_processes=2)


def no_trainer():
    pass


def not_trained():
    make_trainer(hard_coded_arguments())


def asks_and_does_not_train():
    make_trainer(hard_coded_arguments(cmp_num_ablations=3))


def arguments_from_file():
    train(torch.load(Path(sys.argv[1], "training_args.bin"), weights_only=False))


def no_steps():
    make_trainer(hard_coded_arguments(num_train_epochs=0, max_steps=-1)).train()


def resumed():
    """The second training finds that the first one is complete."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    if not Path(sys.argv[1], "checkpoint-2").exists():
        return train(hard_coded_arguments(**settings))
    make_trainer(hard_coded_arguments(**settings)).train(resume_from_checkpoint=True)


def own_loop():
    from cmp_trainer import ComparativeStep, plan

    model = make_trainer(hard_coded_arguments()).model.train()
    step = ComparativeStep(model, plan(num_ablations=2))
    step(torch.utils.data.default_collate([Tokens()[row] for row in range(4)])).backward()


def plain_loop():
    trainer = make_trainer(hard_coded_arguments())
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.model(**torch.utils.data.default_collate([Tokens()[row] for row in range(4)])).loss.backward()
    optimizer.step()
    trainer.evaluate()


def evaluated():
    make_trainer(hard_coded_arguments()).evaluate()


def imported_before():
    from imported_before import ArgumentsOfALibrary, TrainerOfALibrary

    args = ArgumentsOfALibrary(output_dir=sys.argv[1], save_strategy="no", **QUIET)
    make_trainer(args, TrainerOfALibrary).train()


def in_child(rank, output_dir):
    sys.argv[1:] = [output_dir]
    hard_coded()


def spawned():
    torch.multiprocessing.spawn(in_child, args=(sys.argv[1],), nprocs=1)


if __name__ == "__main__":
    globals()[sys.argv[2]]()
