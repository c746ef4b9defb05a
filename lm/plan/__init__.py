"""What a run will hold, compute and cost, before it begins.

Begin with plan.py.
"""
