"""Experiments of DVC: read, compared, drawn, swept.

Begin with read.py.
"""
