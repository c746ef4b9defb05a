"""From any text to shards, and to what a tokenizer learns from. No torch.

Begin with documents.py, then encode_shards.py.
"""
