"""Kehu: the backbone of an event-sourced customer suite."""
