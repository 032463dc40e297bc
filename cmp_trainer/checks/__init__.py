"""Every check: of the setting, of the first batch, and that a comparison took place.

settings.py is asked when a trainer or a step is made, first_batch.py and layers.py in the first step, training.py in
every step and at the end.
"""
