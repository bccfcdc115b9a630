"""The command line tools of moerun: they parse, call `moerun`, and print."""

import moerun_tools.startup  # noqa: F401 (first of all)
from moerun_tools.interrupts import leave_at_once

leave_at_once()
