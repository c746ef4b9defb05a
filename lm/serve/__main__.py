"""`python -m lm.serve`."""

from lm.base.errors import one_line_errors

with one_line_errors():  # Flask may be missing
    from lm.serve.server import main

main()
