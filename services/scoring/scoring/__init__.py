"""Kehu service scoring."""
