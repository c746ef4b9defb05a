"""`python -m lm.serve`."""

from lm.serve.server import main

main()
