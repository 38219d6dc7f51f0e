"""Text -> shuffled documents -> tokens in .bin/.idx -> batches that know no mesh and resume exactly.

prepare.py   text files to a data folder (train, valid, tokenizer.json, meta.json)
indexed.py   the token files' bytes: reader and writer
index.py     an epoch's order of documents and samples, and its cache
blend.py     which data sets: one, a mixture of several, parts of one
loader.py    batches of the endless, resumable run over them
"""
from moe_ext.data.blend import Blend, Sides, open_data, summary, totals
from moe_ext.data.indexed import IndexedDataset, IndexedWriter, token_dtype, unigram_entropy
from moe_ext.data.loader import Batch, Loader

__all__ = ["Batch", "Blend", "IndexedDataset", "IndexedWriter", "Loader", "Sides", "open_data", "summary",
           "token_dtype", "totals", "unigram_entropy"]
