"""Fixtures that the page's tests share."""

from tests.helpers.page import clip, handlers

__all__ = ["clip", "handlers"]
