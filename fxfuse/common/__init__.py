"""Small helpers that every folder may use: output files and locks, memory that is reused."""
