"""A cache filled by replicas on a Ray cluster."""
