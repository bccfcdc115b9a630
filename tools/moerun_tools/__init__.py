"""The command line tools of moerun: they parse, call `moerun`, and print."""
