"""`python -m lm.generate`."""

from lm.generate.stream import main

main()
