"""Which tokenizer made these tokens: the hash that ties token files, tokenizers and runs together.

meta.json of a data folder holds "tokenizer_sha256" = tokenizer_hash(the folder's tokenizer.json); tokens and a
tokenizer whose hashes differ do not belong together.
"""
import hashlib
import json
import os
from pathlib import Path


def tokenizer_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a tokenizer file's bytes, 64 hexadecimal digits. Errors: OSError if it cannot be read."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def data_meta(prefix: str | os.PathLike) -> dict | None:
    """What is known of the token files PREFIX.bin and PREFIX.idx; None for files of other programs.

    That is PREFIX.meta.json (of `merge`), or meta.json of the folder (of `prepare`) if it has an entry of that name.
    Keys: "tokenizer_sha256", "vocab_size", "end_of_text", and "bytes", "tokens", "documents" in meta[PREFIX's name].
    Errors: ValueError if the file is damaged.
    """
    prefix = Path(os.fspath(prefix).removesuffix(".bin").removesuffix(".idx"))
    for path in (Path(f"{prefix}.meta.json"), prefix.parent / "meta.json"):
        if not path.is_file():
            continue
        try:
            meta = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}; a damaged file: prepare the data again") from None
        if isinstance(meta, dict) and prefix.name in meta:
            return meta
    return None
