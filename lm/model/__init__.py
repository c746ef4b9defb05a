"""The Transformer, its kernels, its validation, its files, its names in Hugging Face.

Begin with transformer.py.
"""
