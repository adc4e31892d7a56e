"""Commands that inspect, verify and measure a finished cache."""
