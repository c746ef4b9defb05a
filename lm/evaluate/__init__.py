"""The metrics, baselines and samples of a model, and their summary.

Begin with metrics.py.
"""
