"""Token ids: the tokenizer, shards on disk, batches. No torch.

Begin with splits.py, then order.py.
"""
