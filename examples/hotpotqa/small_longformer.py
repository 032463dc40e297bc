"""A small Longformer with random weights, to try the scripts where the pre-trained one cannot be had.

    python small_longformer.py --tokenizer bert-base-uncased --output small_longformer

It takes 2,048 tokens and trains on a CPU in minutes. What it answers is worth nothing.
"""

import argparse

from transformers import AutoTokenizer, LongformerConfig, LongformerForQuestionAnswering, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="Tokenizer on the Hub, or the folder of one")
    parser.add_argument("--output", required=True, help="Folder to write model and tokenizer to")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.model_max_length = 2048
    config = LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        intermediate_size=4 * args.hidden_size,
        attention_window=128,
        max_position_embeddings=2048 + tokenizer.pad_token_id + 1,  # positions are counted from the padding token's id
        pad_token_id=tokenizer.pad_token_id,
        sep_token_id=tokenizer.sep_token_id,
        type_vocab_size=2,
    )
    LongformerForQuestionAnswering(config).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
