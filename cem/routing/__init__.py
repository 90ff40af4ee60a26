"""Conditional adapters: a light step for every token, the heavy one for those that a router chooses."""

from .top_k import soft_top_k, soft_top_k_sum

__all__ = ["soft_top_k", "soft_top_k_sum"]
