"""Files of weights, read without running code from them: one module a format."""
