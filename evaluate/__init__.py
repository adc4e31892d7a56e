"""Text in, scores and reports out; knows no loss and no cache."""
