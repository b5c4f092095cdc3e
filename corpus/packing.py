"""Best-fit packing of documents into rows of fixed length, without padding."""

from bisect import bisect_left, insort

PACKING_BUFFER = 1000  # documents to choose from


def pack_rows(documents, capacity, state):
    """Yields rows as lists of (tokens, start, length) that together fill `capacity` tokens.

    documents: iterator of (length, tokens, start). As long as a row has room, the longest buffered document that fits
    into it whole is added; if none fits, the shortest one is cropped to fill the row. Of equally long documents the
    one that arrived first is taken. The buffer is sorted by length: a choice is one bisection instead of a scan.
    state, a Counter: "cropped" grows by the number of tokens thrown away."""
    order = []  # ints: length << 40 | (2**40 - 1 - arrival), so that of equal lengths the first arrival comes last
    where = {}  # the low 40 bits -> document
    arrival = low_bits = (1 << 40) - 1
    while True:
        row, room = [], capacity
        while room:
            while len(order) < PACKING_BUFFER and (document := next(documents, None)):
                insort(order, document[0] << 40 | arrival)
                where[arrival] = document
                arrival -= 1
            if not order:
                return
            i = bisect_left(order, (room + 1) << 40) - 1
            if i < 0:
                i = bisect_left(order, ((order[0] >> 40) + 1) << 40) - 1
            length, tokens, start = where.pop(order.pop(i) & low_bits)
            if length > room:
                state["cropped"] += length - room
                length = room
            row.append((tokens, start, length))
            room -= length
        yield row
