"""Write a page of a run, and draw its curves.

Begin with report.py.
"""
