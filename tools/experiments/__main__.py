"""`python -m tools.experiments`."""

from tools.experiments.read import main

main()
