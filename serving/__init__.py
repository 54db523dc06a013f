"""Models with memory in engines that run requests together."""
