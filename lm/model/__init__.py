"""The Transformer, its kernels, its loss, its files, its names in Hugging Face.

Begin with transformer.py.
"""
