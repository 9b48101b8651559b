"""What lead-intake answers to questions."""
