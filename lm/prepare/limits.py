"""How much of a file memory holds, and how long a document may be."""

CHUNK_BYTES = 1 << 22
SEARCH_BYTES = 1 << 16  # read at once where only the next separator is sought
HEAD_BYTES = 1 << 13  # which can contradict the suffix of a file
MAX_DOCUMENT_BYTES = 1 << 26
