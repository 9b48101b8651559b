"""The HTTP edge of analytics."""
