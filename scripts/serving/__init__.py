"""The parts of scripts/serve_openai_api.py: see its docstring for the order in which to read them."""
