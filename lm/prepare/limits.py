"""How much of a file memory holds, and how long a document may be."""

CHUNK_BYTES = 1 << 22
SEARCH_BYTES = 1 << 16  # read at once where only the next separator is sought
HEAD_BYTES = 1 << 13  # decide whether a file is what its suffix says
MAX_DOCUMENT_BYTES = 1 << 26
