"""Ask the teacher once and keep the answer in a form that cannot be mistaken."""
