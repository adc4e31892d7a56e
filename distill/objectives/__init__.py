"""Losses and metrics of the student against the cached teacher."""
