"""What a recipe costs: its steps counted, and timed by a pilot."""
