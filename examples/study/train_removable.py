"""train_classifier.py with an ablation of heads, neurons or layers in training: `--ablate heads --levels 2`.

Without `--ablate` it trains as train_classifier.py does.
"""

import argparse
import sys
from functools import partial

from own_ablations import KINDS
from train_classifier import main
from transformers import Trainer

from cmp_trainer import CmpTrainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ablate", choices=sorted(KINDS), help="what the variants do without")
    parser.add_argument("--levels", type=int, default=1, help="how many variants, each with more taken away")
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    main(partial(CmpTrainer, ablations=[KINDS[given.ablate]] * given.levels) if given.ablate else Trainer)
