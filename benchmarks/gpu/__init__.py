"""The acceptance run on a GPU: everything that this project promises, shown by one command.

Begin with parts.py, which lists what is run; __main__.py runs it within a budget of seconds.
"""
