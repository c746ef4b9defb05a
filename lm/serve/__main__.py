"""`python -m lm.serve`."""

from lm.serve.app import main

main()
