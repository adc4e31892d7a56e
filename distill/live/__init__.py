"""The student's own responses, drawn while it trains and scored by a teacher server."""
