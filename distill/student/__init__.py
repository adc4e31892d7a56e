"""Students made from a teacher's layers."""
