"""What `proof.py` draws."""
