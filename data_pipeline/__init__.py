"""From raw text to a stream of training samples that loses nothing, repeats nothing, and resumes anywhere.

    data_pipeline.prepare.prepare(sources, tokenizer, out_dir)   text -> verified token shards, train and held out
    TokenStream(manifest, seq_length, seed)                      shards -> samples, a pure function of their number

The package stands alone and imports no deep-learning framework. Names are loaded on first use, so importing it costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.cache import ShardCache
    from data_pipeline.corpus import Document, ReadOptions, iterate_documents, iterate_texts, python_stdlib_documents
    from data_pipeline.errors import DataChangedError, DataError
    from data_pipeline.filters import Filters
    from data_pipeline.history import DataHistory
    from data_pipeline.ledger import Ledger
    from data_pipeline.manifest import Manifest, ShardInfo
    from data_pipeline.mixture import MixtureStream
    from data_pipeline.open_tokenizer import load_tokenizer
    from data_pipeline.report import PrepareReport
    from data_pipeline.samples import NO_TOKEN, DocumentSpan, SampleStream
    from data_pipeline.stream import TokenStream
    from data_pipeline.tokenizer import Tokenizer, train_tokenizer
    from data_pipeline.transition import resume
    from data_pipeline.webdataset_adapter import webdataset_pipeline

__all__ = [
    "NO_TOKEN",
    "DataChangedError",
    "DataError",
    "DataHistory",
    "Document",
    "DocumentSpan",
    "Filters",
    "Ledger",
    "Manifest",
    "MixtureStream",
    "PrepareReport",
    "ReadOptions",
    "SampleStream",
    "ShardCache",
    "ShardInfo",
    "TokenStream",
    "Tokenizer",
    "iterate_documents",
    "iterate_texts",
    "load_tokenizer",
    "python_stdlib_documents",
    "resume",
    "train_tokenizer",
    "webdataset_pipeline",
]

_NAMES = {
    "cache": ["ShardCache"],
    "corpus": ["Document", "ReadOptions", "iterate_documents", "iterate_texts", "python_stdlib_documents"],
    "errors": ["DataChangedError", "DataError"],
    "filters": ["Filters"],
    "history": ["DataHistory"],
    "ledger": ["Ledger"],
    "open_tokenizer": ["load_tokenizer"],
    "manifest": ["Manifest", "ShardInfo"],
    "mixture": ["MixtureStream"],
    "report": ["PrepareReport"],
    "samples": ["NO_TOKEN", "DocumentSpan", "SampleStream"],
    "stream": ["TokenStream"],
    "tokenizer": ["Tokenizer", "train_tokenizer"],
    "transition": ["resume"],
    "webdataset_adapter": ["webdataset_pipeline"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
