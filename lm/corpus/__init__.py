"""Make the default texts: source code of installed packages, and stories of a grammar.

Begin with grammar.py.
"""
