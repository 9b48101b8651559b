"""What goes on over time: scores that fade, and all leads under a new model."""
