"""How much crops shorten HotpotQA's training inputs: mean tokens of an input after 0, 1, … crops.

python crop_lengths.py --model_name_or_path allenai/longformer-base-4096 --train_file train.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hotpot_data import ANSWER_COLUMNS, COLUMNS
from hotpot_inputs import TrainingInputs, collator_of
from run_hotpotqa import HotpotArguments, encode, load
from tqdm.auto import tqdm

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.scripting import ModelArguments, load_splits, parse_arguments, plain_errors, take_split


@dataclass
class LengthArguments:
    """What is counted."""

    crops: int = field(default=2, metadata={"help": "Number of crops"})
    epochs: int = field(default=3, metadata={"help": "Epochs of shuffled inputs to count"})
    batch_size: int = field(default=8, metadata={"help": "Inputs that are padded together"})
    seed: int = field(default=42, metadata={"help": "Decides shuffles and crops"})


@plain_errors()
def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(ModelArguments, HotpotArguments, LengthArguments, argv=argv)
    tokenizer, model = load(model_args, data_args, ["train"])
    examples = take_split(load_splits(data_args), "train", COLUMNS + ANSWER_COLUMNS, data_args.max_train_samples)
    encoded, builder = encode(examples, "train", data_args, tokenizer, model)
    inputs = TrainingInputs(encoded, builder, data_args.num_paragraphs, args.seed)
    collator = collator_of(tokenizer, model, data_args.max_length)
    crop = CmpCrop().for_model(model, processing_class=tokenizer, data_collator=collator)

    torch.manual_seed(args.seed)
    totals = torch.zeros(2, args.crops + 1)
    for epoch in tqdm(range(args.epochs), desc="Epochs"):
        inputs.set_epoch(epoch)
        for begin in range(0, len(inputs), args.batch_size):
            rows = [inputs[row] for row in range(begin, min(begin + args.batch_size, len(inputs)))]
            for crops, batch in enumerate(crop.batches(collator(rows), args.crops)):
                mask = batch["attention_mask"]
                totals[:, crops] += torch.tensor([mask.sum().item(), mask.numel()])
    tokens, with_padding = (totals / (args.epochs * len(inputs))).tolist()
    print(f"{len(inputs)} questions, {args.epochs} epochs\n| crops | tokens | with padding |\n| --- | --- | --- |")
    for crops in range(args.crops + 1):
        print(f"| {crops} | {tokens[crops]:,.0f} | {with_padding[crops]:,.0f} |")


if __name__ == "__main__":
    main()
