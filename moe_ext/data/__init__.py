"""Text -> shuffled documents -> tokens in .bin/.idx -> batches that know no mesh and resume exactly.

prepare.py   text files to a data folder (train, valid, tokenizer.json, meta.json)
indexed.py   the token files' bytes: reader and writer
loader.py    the endless, resumable order of samples
"""
from moe_ext.data.indexed import IndexedDataset, IndexedWriter, token_dtype, unigram_entropy
from moe_ext.data.loader import Batch, Loader

__all__ = ["Batch", "IndexedDataset", "IndexedWriter", "Loader", "token_dtype", "unigram_entropy"]
