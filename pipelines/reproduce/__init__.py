"""The paper's tables and figures from their recipes."""
