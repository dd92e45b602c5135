"""Tables, figures and option files.

matplotlib and BasicSR may be absent, and are imported inside functions.
"""
