"""How much of a file memory holds, and how long a document may be."""

CHUNK_BYTES = 1 << 22  # read at once
SEARCH_BYTES = 1 << 16  # read at once to find the next separator
HEAD_BYTES = 1 << 13  # the first bytes, which can contradict the suffix of a file
MAX_DOCUMENT_BYTES = 1 << 26
