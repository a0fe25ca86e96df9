"""One tenth of many like cases in each run, all of them in `make nightly`; another tenth each day.

`WASMFLEET_TENTH` names the tenth: 0 to 9, or `none`. The run says which it was.
"""

import datetime as dt
import os

import pytest

VARIABLE = "WASMFLEET_TENTH"


def choose():
    """Choose the tenth of this run, once: the processes that share the tests must agree on it."""
    day = dt.datetime.now(dt.UTC).date().toordinal()
    return os.environ.setdefault(VARIABLE, str(day % 10))


def rotated(cases):
    """The parameters of a test for these cases, of which all but the tenth of this run are marked nightly."""
    tenth = choose()
    return [
        pytest.param(case, marks=() if str(number % 10) == tenth else pytest.mark.nightly)
        for number, case in enumerate(cases)
    ]
