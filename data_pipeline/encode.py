"""The part of preparing that runs on every core: raw documents in, checked and tokenized documents out."""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from data_pipeline.corpus import Document, Rejected, document_text
from data_pipeline.dedup import minhash
from data_pipeline.errors import DataError
from data_pipeline.filters import Filters
from data_pipeline.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class EncodedDocument:
    """A document ready to be written, or the reason why it is not."""

    source: str
    position: int
    num_bytes: int = 0  # of its text in UTF-8
    file_bytes: int = 0  # how far its file had been read
    reason: str | None = None
    fields: tuple[str, ...] = ()  # text fields of a record that has not the one asked for
    sha256: bytes = b""  # of its text in UTF-8
    tokens: np.ndarray | None = None
    signature: np.ndarray | None = None  # MinHash, when near-duplicates are looked for


@dataclass(frozen=True)
class Encoder:
    """Everything that decides what becomes of a document by itself."""

    tokenizer: Tokenizer
    filters: Filters
    text_field: str
    with_signature: bool

    def __call__(self, document: Document) -> EncodedDocument:
        try:
            text = document_text(document, self.text_field)
            self.filters.check(text)
        except Rejected as reason:
            return EncodedDocument(
                document.source,
                document.position,
                len(document.data),
                document.file_bytes,
                reason=str(reason),
                fields=reason.fields,
            )
        return self.encoded(document, text, self.tokenizer.encode(text, self.tokenizer.token_dtype))

    def encoded(self, document: Document, text: str, tokens: np.ndarray) -> EncodedDocument:
        """A document with its text and its ids."""
        data = text.encode("utf-8")
        return EncodedDocument(
            source=document.source,
            position=document.position,
            num_bytes=len(data),
            file_bytes=document.file_bytes,
            sha256=hashlib.sha256(data).digest(),
            tokens=tokens,
            signature=minhash(text) if self.with_signature else None,
        )


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that a batch costs far more to encode than to hand to another process."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents: Iterable[Document], encoder: Encoder, workers: int) -> Iterator[EncodedDocument]:
    """Encode documents on ``workers`` processes and yield the results in the order of the documents."""
    if workers <= 1:
        yield from map(encoder, documents)
        return
    # Spawned, not forked: a process that also runs threads (torch, BLAS) cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: collections.deque[Future[list[EncodedDocument]]] = collections.deque()
        try:
            for batch in batches(documents):
                pending.append(pool.submit(_encode_batch, batch))
                if len(pending) >= 3 * workers:  # bounds what is read ahead
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely because memory ran out. Run the same command again with fewer "
                "--workers; it continues where it stopped."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    _encoder = encoder


def _exit_with(sentinel: int) -> None:
    """A killed parent cannot stop its workers; they watch it and go."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode_batch(batch: list[Document]) -> list[EncodedDocument]:
    assert _encoder is not None
    return [_encoder(document) for document in batch]
