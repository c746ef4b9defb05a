"""`python -m tools.report`."""

from tools.report.report import main

main()
