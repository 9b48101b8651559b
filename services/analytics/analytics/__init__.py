"""Kehu service analytics."""
