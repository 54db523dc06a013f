"""How models and tokenizers with memory show themselves."""

from .summaries import TableSummary, model_html, print_memory_summary, register, summarize_tables, tokenizer_html

__all__ = ["TableSummary", "model_html", "print_memory_summary", "register", "summarize_tables", "tokenizer_html"]
