"""What the train loop (`easyctx/train.py`) stands on: configuration, model, data, optimizer, reports, output."""
