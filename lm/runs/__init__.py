"""A run's life on disk: checkpoints, resuming, history, publishing.

Begin with run.py.
"""
