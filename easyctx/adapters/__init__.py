"""LoRA adapters and 4-bit weights: a few parameters trained beside a frozen model, by peft and bitsandbytes.

settings.py   what a run asks for, and which of it an engine can do
inject.py     adapters put into a model, whose own code stays as it is
quantise.py   a model's weights loaded in 4 bits
folder.py     an adapter's folder: what it says, and its weights put into a model
save.py       the trained parameters gathered, and written as peft would
merge.py      `easyctx merge`: an adapter added to the weights it was trained beside
"""
