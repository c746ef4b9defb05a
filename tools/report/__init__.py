"""A run on a page, and its curves.

Begin with report.py.
"""
