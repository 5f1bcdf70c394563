"""Foundations; imports no sibling package."""
