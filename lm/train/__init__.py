"""Training: the loop, one step, optimizers, schedules, gradients of several processes.

Begin with step.py.
"""
