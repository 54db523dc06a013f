"""Text and HTML views of models and tokenizers with memory."""

from .summaries import TableSummary, model_html, print_memory_summary, register, summarize_tables, tokenizer_html

__all__ = ["TableSummary", "model_html", "print_memory_summary", "register", "summarize_tables", "tokenizer_html"]
