"""Options of `dpkd eval`, `dpkd report` and `dpkd judge`."""
