"""Checkpoints of other layouts to ours and back: a script a direction, a table of tensor rules, one streaming engine."""
