"""The metrics of a model and what they are compared with; samples; the summary.

Begin with metrics.py.
"""
