"""`python -m lm.generate`."""

from lm.generate.command import main

main()
