"""Real published networks: what each file measures is said in its docstring; `data` is shared."""
