"""`python -m lm.plan`."""

from lm.plan.page import main

main()
