"""The prepared data: what they look like on disk (layout, tokenizer, shards, packing) and how they are made.

rules.py lists the files whose content decides a score. Nothing in this package imports prepare, torch or lab.
"""
