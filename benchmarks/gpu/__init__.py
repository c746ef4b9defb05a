"""The acceptance run on a GPU: one command that tests everything that this project promises there.

Begin with parts.py, which lists what is run; __main__.py runs it within a budget of seconds.
"""
