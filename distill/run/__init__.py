"""What surrounds the training loop: set-up, checkpoints, validation, logs, ranks."""
