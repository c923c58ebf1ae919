"""Benchmarks: each workload beside what the same servers do for framework-free code, its limit. See docs/bench."""
