"""Images in: how data sets are built, in the tree that the option files name.

`datasets/prepare.py` and ``dlgsanet data`` are the two doors to the same verbs.
"""

SCALES = (2, 3, 4)  # HR side over LR side: what data sets are made for
