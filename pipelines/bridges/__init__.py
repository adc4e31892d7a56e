"""What needs two packages that do not know each other."""
