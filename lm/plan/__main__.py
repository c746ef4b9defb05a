"""`python -m lm.plan`."""

from lm.plan.plan import main

main()
