"""The Chromium that is installed, for pages to be looked at as a person would."""

import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
