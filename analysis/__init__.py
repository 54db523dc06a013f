"""Measurements of what a model's memory does, for any Engram model, as plain data with pictures."""

from .attention import AttentionFreed, measure_attention
from .depth import EffectiveDepth, LayerSimilarity, compare_layers, measure_depth
from .evaluation import Edit, Estimate, Off
from .gates import Gates, measure_gates
from .pages import reading_page
from .pictures import draw, draw_depths
from .reading import Reading, read_text
from .report import Report
from .texts import Windows, cut_windows
from .traffic import RowTraffic, measure_traffic
from .worth import MemoryWorth, measure_worth

__all__ = [
    "AttentionFreed",
    "Edit",
    "EffectiveDepth",
    "Estimate",
    "Gates",
    "LayerSimilarity",
    "MemoryWorth",
    "Off",
    "Reading",
    "Report",
    "RowTraffic",
    "Windows",
    "compare_layers",
    "cut_windows",
    "draw",
    "draw_depths",
    "measure_attention",
    "measure_depth",
    "measure_gates",
    "measure_traffic",
    "measure_worth",
    "read_text",
    "reading_page",
]
