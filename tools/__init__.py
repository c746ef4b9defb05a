"""What a person runs beside the pipeline: heal, lock, verify, experiments, report.

The stages know nothing of it, and a change here runs no stage again.
"""

import stages  # noqa: F401 - says which Python is missing, and takes code from its source
