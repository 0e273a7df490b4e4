"""What `scripts/convert_model.py` is made of: one module for each form a model can take, and one that checks them."""
