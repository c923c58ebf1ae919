"""Projections: the definition language, compiled folds, read stores, the projector."""
