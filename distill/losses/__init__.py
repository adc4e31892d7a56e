"""The mathematics of the objectives: pure functions of log-probabilities, unreduced, in nats."""
