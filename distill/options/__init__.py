"""Options of `dpkd train` and `dpkd init-student`."""
