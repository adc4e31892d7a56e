"""Put the parts together for a person: the command line, recipes, run directories."""
