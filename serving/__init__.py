"""Serving: models with memory in engines that batch requests."""
