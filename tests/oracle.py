"""The dataloader's oracle: best-fit packing by scanning a plain list, as the rules say it and no faster.

The rule. Documents arrive in shard order, each as [BOS] + tokens; at the end of the data the next epoch goes on
with the buffer as it stands. Before each placement the buffer is filled up to 1,000 documents. A row holds T + 1
tokens. The longest document that fits entirely in what remains of the row goes in next; where none fits, the
shortest is cropped to what remains and the rest of it is thrown away. Among equals the earliest arrival goes first.
Where the epochs are counted, the buffer is emptied at their end and a last row that does not fill up is no row.
"""

import itertools

import torch

BUFFER_DOCUMENTS = 1000


def rows_from_tokens(documents, T, bos_id, epochs=None):
    """Yields rows of T + 1 ids, for ever without `epochs`. documents: one epoch, token lists without BOS."""
    return _rows(_batches(lambda: documents, 1, lambda batch: batch, epochs), T, bos_id)


def batches_from_text(read_texts, encoding, B, T, bos_id):
    """Yields (x, y), each (B, T) int64, tokenising 128 documents at a time as it goes: what the prepared token
    shards replace. read_texts: a function that starts one epoch of texts. encoding: a tiktoken.Encoding."""

    def tokenise(texts):
        return encoding.encode_ordinary_batch(texts, num_threads=1)

    rows = _rows(_batches(read_texts, 128, tokenise, None), T, bos_id)
    while True:
        batch = torch.tensor([next(rows) for _ in range(B)], dtype=torch.long)  # (B, T + 1)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def _batches(read_documents, batch_size, tokenise, epochs):
    for _ in itertools.count() if epochs is None else range(epochs):
        batch = []
        for document in read_documents():
            batch.append(document)
            if len(batch) == batch_size:
                yield tokenise(batch)
                batch = []
        if batch:
            yield tokenise(batch)


def _rows(batches, T, bos_id):
    row_capacity = T + 1
    buffer = []  # documents in the order they arrived
    while True:
        row = []
        while len(row) < row_capacity:
            while len(buffer) < BUFFER_DOCUMENTS and (batch := next(batches, None)):
                buffer.extend([bos_id, *document] for document in batch)
            if not buffer:
                return
            remaining = row_capacity - len(row)
            best = None
            for i, document in enumerate(buffer):
                if len(document) <= remaining and (best is None or len(document) > len(buffer[best])):
                    best = i
            if best is not None:
                row.extend(buffer.pop(best))
            else:
                shortest = min(range(len(buffer)), key=lambda i: len(buffer[i]))  # the first of equals
                row.extend(buffer.pop(shortest)[:remaining])
        yield row
