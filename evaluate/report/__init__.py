"""The report as data: tables, curves, provenance."""
