"""The shapes of benchmarks/train_step.py, apart, so that its parent processes need not import transformers."""

MODELS = {
    "llama-3-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=(32, 8), vocab=128256),
    "llama-2-7b": dict(hidden=4096, intermediate=11008, layers=32, heads=(32, 32), vocab=32000),
    "llama-33b": dict(hidden=6656, intermediate=17920, layers=60, heads=(52, 52), vocab=32000),
    "llama-3-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=(32, 8), vocab=128256),
    "tiny": dict(hidden=64, intermediate=128, layers=4, heads=(4, 2), vocab=512),
}
