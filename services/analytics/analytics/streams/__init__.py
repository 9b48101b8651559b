"""The stream worker: live counters, carried by Faust and kept in PostgreSQL."""
