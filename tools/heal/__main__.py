"""`python -m tools.heal`."""

from tools.heal.heal import main

main()
