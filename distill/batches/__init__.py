"""From rows to the tensors of a step, and the order in which steps read rows."""
