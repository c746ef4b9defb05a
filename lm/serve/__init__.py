"""The model behind an API and a playground: `python -m lm.serve`.

Begin with app.py.
"""
