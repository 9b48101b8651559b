"""Tables and what is asked of them. Inputs and published models are written with the decisions, so they are never behind."""
