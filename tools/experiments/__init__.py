"""Read, compare, draw and sweep experiments of DVC.

Begin with read.py.
"""
