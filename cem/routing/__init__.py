"""Conditional adapters: a light step for every token, the heavy one for those that a router chooses."""

from .adapter import Adapter
from .cache import RoutedCache
from .potential import Potential
from .routed import Routed
from .router import Choice, Router
from .top_k import soft_top_k, soft_top_k_sum

__all__ = [
    "Adapter",
    "Choice",
    "Potential",
    "Routed",
    "RoutedCache",
    "Router",
    "soft_top_k",
    "soft_top_k_sum",
]
