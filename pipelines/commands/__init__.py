"""The commands of `dpkd`."""
