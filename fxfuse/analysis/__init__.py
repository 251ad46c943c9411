"""The dependency analyzer: labels, rules, coupling groups, and what is frozen and why."""
