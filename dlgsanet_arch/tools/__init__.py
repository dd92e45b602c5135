"""What is done with runs, networks and pictures beside training: figures, counts, option files.

matplotlib, TensorBoard and BasicSR may be absent, and are imported inside functions.
"""
