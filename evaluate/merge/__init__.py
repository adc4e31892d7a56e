"""Several evaluations merged into one report."""
