"""The model for others: a folder of Hugging Face, its card, GGUF.

Begin with folder.py.
"""
