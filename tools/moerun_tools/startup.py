"""Runs before anything else of a tool is imported; takes no module that takes time to import."""

import _signal  # type: ignore[import-not-found, unused-ignore]
import sys

_TOOLS = ("moe-run", "moe-trace", "moe-metrics", "moe-plan", "moe-predictor")


def _is_tool() -> bool:
    name = sys.argv[0].rpartition("/")[2].removesuffix(".exe") if sys.argv else ""
    options = sys.orig_argv
    return name in _TOOLS or any(
        options[i - 1] == "-m" and options[i].startswith("moerun_tools.")
        for i in range(1, len(options))
    )


# Whether this process is a tool, not a test or another program that imports one.
IS_TOOL = _is_tool()

# Python's own handler would raise KeyboardInterrupt in the middle of an import.
if IS_TOOL and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
