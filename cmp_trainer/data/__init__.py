"""Labelled data as people have it, read in one way: tables, texts with labels, questions with answers.

The commands (`cmp-trainer curve`) and the example scripts read through this room, so both give the same numbers. It
knows tokenizers and models, and no trainer.
"""
