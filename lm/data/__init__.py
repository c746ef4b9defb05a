"""Token ids: the tokenizer, shards on disk, batches. No torch.

Begin with batches.py, then order.py.
"""
