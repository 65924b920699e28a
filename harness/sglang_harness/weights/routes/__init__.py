"""The ways for weights to reach a server: one module each, behind one protocol."""
