"""Limits: what the servers do for framework-free code. Written once and then left alone, so that ratios compare."""
