"""From any text to a tokenizer and to token shards. No torch.

Begin with documents.py, then encode_shards.py.
"""
