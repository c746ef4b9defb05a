"""From any text to token shards, and to a tokenizer. No torch.

Begin with documents.py, then encode_shards.py.
"""
