"""Every check: of the setting, of the first batch, and that a comparison took place.

settings.py is asked when a trainer or a step is made, first_batch.py and layers.py before the first step or
evaluation, training.py in every step and at the end.
"""
