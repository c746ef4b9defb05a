"""Check every setting: `python -m stages.check`, the first step of `make repro`."""

from lm.base.errors import one_line_errors
from lm.base.params import load_params
from lm.base.paths import PARAMS
from lm.check import check

if __name__ == "__main__":
    with one_line_errors():
        check(load_params(PARAMS), str(PARAMS))
