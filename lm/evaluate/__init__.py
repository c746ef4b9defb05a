"""What a loss is compared with: baselines, an excerpt.

Begin with baselines.py.
"""
