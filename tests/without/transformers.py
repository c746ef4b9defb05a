"""Stands before the real one on the path of a project's programs: they start seconds faster."""

raise ImportError("not for the programs of a test's project")
