"""Kehu service lead-intake."""
