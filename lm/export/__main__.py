"""`python -m lm.export`."""

from lm.export.folder import main

main()
