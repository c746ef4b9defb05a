"""What a person runs beside the pipeline. docs/ARCHITECTURE.md lists the tools in its picture.

No stage imports from here, so a change here runs no stage again.
"""

import stages  # noqa: F401 - says which Python is missing, and takes code from its source
