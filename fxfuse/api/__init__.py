"""The public functions, their results, and saved results."""
