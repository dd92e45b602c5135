"""Images in: how data sets are built, in the tree that the option files name.

`datasets/prepare.py` and ``dlgsanet data`` are the two doors to the same verbs.
"""
