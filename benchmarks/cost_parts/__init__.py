"""What `cost_model.py` is made of: predicted beside measured, charts, and figures to hold predictions against."""
