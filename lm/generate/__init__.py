"""Decoding and sampling: `python -m lm.generate`.

Begin with stream.py.
"""
