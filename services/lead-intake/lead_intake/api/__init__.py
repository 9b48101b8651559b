"""The HTTP edge of lead-intake."""
