"""The foundation of all other wings: errors, settings, files, result files, console, random bits.

Begin with errors.py, then settings.py: every setting of model and training.
"""
