"""Learn from the cached teacher."""
