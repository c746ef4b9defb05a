"""Training: the loop, one step, optimizers, schedules, gradients of several processes.

Begin with loop.py, then step.py.
"""
