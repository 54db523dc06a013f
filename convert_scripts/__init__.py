"""Conversion of checkpoints to this package's layout and back: a script for each direction, tables of tensor rules,
and one streaming engine.
"""
