"""Conversion of checkpoints to this package's layout and back: one script for each direction, tables of tensor rules, one streaming engine."""
