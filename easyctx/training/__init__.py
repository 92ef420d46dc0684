"""What the train loop (`easyctx/train.py`) stands on: its configuration, its model, its data, its reports, its output."""
